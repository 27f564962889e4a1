"""GET /v1/models, /health and /metrics: what is served, and how it goes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from vlbench.serve.api.access_checks import SAFE_METHODS
from vlbench.serve.api.api_state import api_state
from vlbench.serve.api.server_metrics import METRICS_TYPE

HEALTH_PATH = "/health"
router = APIRouter()


@router.api_route("/v1/models", methods=[*SAFE_METHODS])
async def list_models(request: Request) -> dict[str, Any]:
    """Return OpenAI's list of models, with connector, visual tokens and image size of each."""
    models = api_state(request).models.values()
    return {"object": "list", "data": [model.describe() for model in models]}


@router.api_route("/v1/models/{name:path}", methods=[*SAFE_METHODS])
async def show_model(request: Request, name: str) -> dict[str, Any]:
    """Return one model of the list."""
    return api_state(request).find_model(name).describe()


@router.api_route(HEALTH_PATH, methods=[*SAFE_METHODS])
async def check_health(request: Request) -> Response:
    """Say that requests are accepted; 503 once the server has been asked to stop."""
    if api_state(request).is_draining:
        return JSONResponse({"status": "stopping"}, 503)
    return JSONResponse({"status": "ok"})


@router.api_route("/metrics", methods=[*SAFE_METHODS])
async def show_metrics(request: Request) -> Response:
    """Return the counts of the server in Prometheus' text format."""
    state = api_state(request)
    text = state.metrics.render_text(state.models.values())
    return Response(text, headers={"Content-Type": METRICS_TYPE})
