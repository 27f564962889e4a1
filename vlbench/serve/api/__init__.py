"""The HTTP server: OpenAI's chat completions over the models that `serve` has loaded.

`app.create_app` joins the modules of routes; the settings are in `api_settings`, what a route sees
of the server in `api_state`. FastAPI and uvicorn come with `pip install '.[serve]'`.
"""
