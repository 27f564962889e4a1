"""The application: routes, errors and checks of access, over models that are loaded."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI

from vlbench.serve import page_routes
from vlbench.serve.api import chat_routes, model_routes
from vlbench.serve.api.access_checks import AccessChecks
from vlbench.serve.api.api_errors import install_error_handlers
from vlbench.serve.api.api_settings import ApiSettings
from vlbench.serve.api.api_state import ApiState
from vlbench.serve.api.remote_images import RemoteImages
from vlbench.serve.api.served_model import ServedModel
from vlbench.serve.page_files import file_router, page_files
from vlbench.serve.page_routes import PageState
from vlbench.serve.vote_file import VoteFile

ROUTERS = (chat_routes.router, model_routes.router, page_routes.router)
OPEN_PATHS = (model_routes.HEALTH_PATH,)
"""Addresses that are answered without the key: what holds no secret and does no work."""


def create_app(
    served_models: Sequence[ServedModel],
    settings: ApiSettings,
    remote_images: RemoteImages | None = None,
    votes: VoteFile | None = None,
) -> FastAPI:
    """Return the application; its `state.api` is the ApiState that routes work with.

    `remote_images` downloads the images of `settings.image_hosts`; another one is for tests. Votes
    of the page are kept in `votes`.
    """
    remote_images = remote_images or RemoteImages(settings.image_hosts)
    # FastAPI's own pages load scripts from another site
    app = FastAPI(
        title="vlbench", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    state = ApiState(served_models, settings, remote_images)
    app.state.api = state
    app.state.page = PageState(state.models, votes)
    install_error_handlers(app)
    app.add_middleware(AccessChecks, state=state, open_paths=(*OPEN_PATHS, *page_files()))
    for router in (*ROUTERS, file_router()):
        app.include_router(router)
    return app
