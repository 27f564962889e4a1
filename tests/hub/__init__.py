"""A hub of our own: a loopback server that speaks what `huggingface_hub` asks.

`server` answers requests and makes trouble when it is told to, `repository` holds files,
`model_repositories` fills repositories with small random weights in the names and layouts of the
real ones, `shallow_encoders` makes the real architectures of open_clip two blocks deep so that such
weights stay small.

    python -m tests.hub

serves all of it and prints the line that points `huggingface_hub` to it.
"""
