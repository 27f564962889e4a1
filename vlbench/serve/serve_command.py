"""`python -m vlbench serve`: models behind OpenAI's API on this machine."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vlbench.command_line.arguments import ServeArguments
from vlbench.errors import UserError
from vlbench.garbage_collection import pause_garbage_collection
from vlbench.text_files import format_json

if TYPE_CHECKING:
    from vlbench.serve.api.api_settings import ApiSettings
    from vlbench.serve.api.served_model import ServedModel
    from vlbench.serve.vote_file import VoteFile

KEY_VARIABLE = "VLBENCH_API_KEY"
EXTRA_PACKAGES = ("fastapi", "uvicorn")
HOST_NAME = re.compile(r"[a-z0-9._-]+|\[[0-9a-f:.]+\]", re.IGNORECASE)
HOST_AND_PORT = re.compile(rf"({HOST_NAME.pattern})(:[0-9]{{1,5}})?", re.IGNORECASE)


def run_serve(arguments: ServeArguments) -> int:
    """Serve the models until a signal ends it; return the exit code."""
    missing = [name for name in EXTRA_PACKAGES if find_spec(name) is None]
    if missing:
        packages, words = " and ".join(missing), " ".join(missing)
        raise UserError(f"serve needs {packages}, which are not here: pip install {words}")
    with pause_garbage_collection():
        from vlbench.load_model import find_model_folder
        from vlbench.serve.api.app import create_app
        from vlbench.serve.api.http_server import ApiServer, bind_socket
        from vlbench.serve.api.served_model import choose_model_names

    settings = read_settings(arguments)
    paths = split_paths(arguments.model)
    if not paths:
        raise UserError("model names no model; write model=PATH or model=PATH,PATH")
    names = choose_model_names(paths)
    votes = _open_votes(arguments.votes, names) if arguments.votes else None
    listener = bind_socket(settings.host, arguments.port)  # before models, which take minutes
    try:
        for path in paths:  # likewise: the last may be misspelt
            find_model_folder(path, "model")
        models = [
            load_served_model(name, path, arguments)
            for name, path in zip(names, paths, strict=True)
        ]
        server = ApiServer(create_app(models, settings, votes=votes), settings)
        port = listener.getsockname()[1]
        listener.listen()  # who connects as soon as the lines are read waits for uvicorn
        print("\n".join(start_lines(models, settings, port)), flush=True)
        try:
            server.run([listener])
        finally:
            server.close_engines()
        return server.exit_code
    finally:
        listener.close()


def _open_votes(file: str, names: Sequence[str]) -> VoteFile:
    """Return the file of votes on these models; a UserError where there is nothing to vote on."""
    from vlbench.serve.vote_file import VoteFile

    if len(names) < 2:
        raise UserError(
            f"votes={file} has nothing to vote on: answers of several models are compared; write "
            "model=PATH,PATH"
        )
    return VoteFile(Path(file).expanduser(), names)


def read_settings(arguments: ServeArguments) -> ApiSettings:
    """Return the settings of the words; a UserError where others could reach it without a key."""
    from vlbench.serve.api.api_settings import ApiSettings, is_loopback_host

    _check_host(arguments.host)
    key = arguments.api_key or os.environ.get(KEY_VARIABLE) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError("the API key has characters that no header holds; take letters and digits")
    if key is None and not is_loopback_host(arguments.host):
        raise UserError(
            f"host={arguments.host} can be reached by others: set a key in the environment "
            f"variable {KEY_VARIABLE} (or api_key=KEY, which other users of this machine can see)"
        )
    return ApiSettings(
        host=arguments.host,
        api_key=key,
        allowed_hosts=tuple(
            host.lower() for host in _read_hosts("allow_hosts", arguments.allow_hosts, HOST_NAME)
        ),
        image_hosts=_read_hosts("allow_urls", arguments.allow_urls, HOST_AND_PORT),
        max_images=arguments.max_images,
    )


def _check_host(host: str) -> None:
    """Raise a UserError for a URL, or an address with a port, in the place of an address."""
    with_port = HOST_AND_PORT.fullmatch(host)
    if "/" in host or (with_port and with_port[2]):
        raise UserError(f"host is '{host}'; write the address alone, and the port as port=N")


def _read_hosts(key: str, text: str | None, pattern: re.Pattern[str]) -> tuple[str, ...]:
    """Return the hosts of a key; a UserError names one that no request could be of."""
    hosts = split_list(text)
    for host in hosts:
        if not pattern.fullmatch(host):
            port = " or HOST:PORT" if pattern is HOST_AND_PORT else ""
            raise UserError(f"{key} names '{host}'; write HOST{port}, without http:// and paths")
    return hosts


def split_list(text: str | None) -> tuple[str, ...]:
    """Return the items of `a,b`."""
    return tuple(item.strip() for item in (text or "").split(",") if item.strip())


def split_paths(text: str) -> list[str]:
    """Return the paths of `a,b`; a folder whose own name has commas is one."""
    whole = os.path.expanduser(text.strip())
    if os.path.isdir(whole):
        return [whole]
    return [os.path.expanduser(path) for path in split_list(text)]


def load_served_model(name: str, path: str, arguments: ServeArguments) -> ServedModel:
    """Load a model and start its engine."""
    with pause_garbage_collection():
        from vlbench.load_model import load_model
        from vlbench.model.generation.decoding_state import CompiledDecodeStep
        from vlbench.serve.api.served_model import ServedModel
        from vlbench.serve.generation_engine import GenerationEngine

    vlm = load_model(
        path,
        arguments.dtype,
        arguments.device,
        arguments.template,
        arguments.trust_connector,
    )
    decode_step = CompiledDecodeStep(any_shape=True) if arguments.compiled else None
    engine = GenerationEngine(
        vlm, arguments.max_rows, arguments.max_waiting, decode_step=decode_step
    )
    return ServedModel(name, vlm, engine, created=int(time.time()))


def start_lines(models: list[ServedModel], settings: ApiSettings, port: int) -> list[str]:
    """Return what is printed when the server is ready: models, addresses, an example."""
    address = f"http://{settings.url_host}:{port}"
    question = {
        "model": models[0].name,
        "messages": [{"role": "user", "content": "What can you see?"}],
    }
    words = ["curl", f"{address}/v1/chat/completions", "-H", "Content-Type: application/json"]
    command = shlex.join([*words, "-d", format_json(question)])
    if settings.api_key:  # in quotes in which the shell puts the variable's value
        command += f' -H "Authorization: Bearer ${KEY_VARIABLE}"'
    return [
        *(_describe_model(model) for model in models),
        f"API: {address}/v1 (as OpenAI's; Ctrl-C ends it when its answers are written)",
        f"page: {address}/",
        f"try: {command}",
    ]


def _describe_model(model: ServedModel) -> str:
    facts = model.describe()
    tokens, views = facts["visual_tokens_per_image"], facts["most_views_per_image"]
    what = "image" if views == 1 else f"view (an image has up to {views})"
    settings = model.vlm.processor.view_settings
    most = "up to " if settings is not None and settings.tiling is None else ""
    return (
        f"{model.name}: {facts['connector']}, {most}{tokens} visual "
        f"token{'' if tokens == 1 else 's'} per {what} of {facts['image_size']} pixels, on "
        f"{model.vlm.device}"
    )
