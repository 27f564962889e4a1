"""The application: routes, errors and checks of access, over models that are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from vlbench.serve.api import chat_routes, model_routes
from vlbench.serve.api.access_checks import AccessChecks
from vlbench.serve.api.api_errors import install_error_handlers
from vlbench.serve.api.api_settings import ApiSettings
from vlbench.serve.api.api_state import ApiState
from vlbench.serve.api.image_inputs import ImageInputs
from vlbench.serve.api.remote_images import RemoteImages
from vlbench.serve.api.served_model import ServedModel

ROUTERS = (chat_routes.router, model_routes.router)
"""The routes; a module of further ones, as of a page, is added here."""
OPEN_PATHS = (model_routes.HEALTH_PATH,)
"""Addresses that are answered without the key: what holds no secret and does no work."""


def create_app(
    served_models: Sequence[ServedModel],
    settings: ApiSettings,
    remote_images: RemoteImages | None = None,
) -> FastAPI:
    """Return the application; its `state.api` is the ApiState that routes work with.

    `remote_images` downloads the images of `settings.image_hosts`; another one is for tests.
    """
    remote_images = remote_images or RemoteImages(settings.image_hosts)
    # FastAPI's own pages load scripts from another site
    app = FastAPI(
        title="vlbench", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    state = ApiState(served_models, settings, ImageInputs(settings, remote_images))
    app.state.api = state
    install_error_handlers(app)
    app.add_middleware(AccessChecks, state=state, open_paths=OPEN_PATHS)
    for router in ROUTERS:
        app.include_router(router)
    return app
