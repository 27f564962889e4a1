"""`graft`: do this vision encoder, this connector and this language model fit?"""
