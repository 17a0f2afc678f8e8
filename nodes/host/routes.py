"""What the pack's scripts in the editor ask of the server: a run's history, the list of runs, and changes to them.

Runs are named by digest. What changes something is a POST of JSON, which no page of another origin can send unasked.
"""

import asyncio
import json
from collections.abc import Callable

from aiohttp import web
from server import PromptServer

from ...trainers.text import reason, remedy
from . import live, prompt_texts, run_list
from .run_list import is_digest


async def get_run(request: web.Request) -> web.Response:
    """Answer GET /personalize/runs/{digest} with a run's history."""
    digest = request.match_info["digest"]
    # In a thread, so that a long history does not delay other answers.
    found = await asyncio.to_thread(live.history, digest) if is_digest(digest) else None
    return (
        web.json_response(found)
        if found
        else _refused(404, "The run does not exist: its folder may have been deleted.")
    )


async def get_runs(request: web.Request) -> web.Response:
    """Answer GET /personalize/runs with all runs as cards, the newest first, and the size of the cache."""
    return web.json_response(await asyncio.to_thread(_listed))


def _listed() -> dict:
    return {"runs": run_list.cards(), "cache": run_list.cache_size()}


async def post_finish(request: web.Request) -> web.Response:
    """Answer POST /personalize/finish {"run": digest, "client": id}: end the run's stage after the next step.

    The client is the one that queued the training; a program that queued it without an id sends none here either.
    """
    asked = await _asked(request, "run", "client") or await _asked(request, "run")
    if asked is None:
        return _refused(400, 'The request is not valid: send {"run": "..."} with the 16 hexadecimal digits of a run.')
    view = live.RUNNING.get(asked["run"])
    if view is None:
        return _refused(404, "The run is not training: there is nothing to finish.")
    if view.owner() not in (None, asked.get("client")):
        return _refused(403, "The run was queued by another client: finish it in the editor that queued it.")
    view.finishing = True
    return web.json_response({"run": asked["run"]})


async def post_delete(request: web.Request) -> web.Response:
    """Answer POST /personalize/runs/delete {"run": digest}: delete a run, and return the list."""
    return await _changed(request, lambda run: run_list.find(run).delete(), "run")


async def post_rename(request: web.Request) -> web.Response:
    """Answer POST /personalize/runs/rename {"run": digest, "name": text}: name a run, and return the list."""
    return await _changed(request, run_list.rename, "run", "name")


async def post_reopen(request: web.Request) -> web.Response:
    """Answer POST /personalize/runs/reopen {"run": digest, "node": id}: let an ended run train on at that node."""
    return await _changed(request, run_list.reopen, "run", "node")


async def post_delete_cache(request: web.Request) -> web.Response:
    """Answer POST /personalize/cache/delete {}: delete what runs share, and return the list."""
    return await _changed(request, run_list.delete_cache)


async def _changed(request: web.Request, change: Callable[..., None], *names: str) -> web.Response:
    asked = await _asked(request, *names) if request.content_type == "application/json" else None
    if asked is None:
        wanted = " and ".join(names) or "nothing"
        return _refused(400, f"The request is not valid: send JSON with {wanted}, a run by its 16 hexadecimal digits.")
    try:
        await asyncio.to_thread(change, *asked.values())
    except (ValueError, RuntimeError) as error:
        return _refused(409, str(error))
    except OSError as error:
        return _refused(409, f"The files cannot be changed ({reason(error)}): {remedy(error)} and try again.")
    return await get_runs(request)


async def _asked(request: web.Request, *names: str) -> dict[str, str] | None:
    """Return the text values of a request in the order of `names`; `None` unless it holds just these."""
    try:
        asked = json.loads(await request.read())
    except (ValueError, RecursionError):
        return None
    if not isinstance(asked, dict) or asked.keys() != {*names} or not all(isinstance(v, str) for v in asked.values()):
        return None
    return {name: asked[name] for name in names} if is_digest(asked.get("run", "0" * 16)) else None


def _refused(status: int, sentence: str) -> web.Response:
    return web.json_response({"error": sentence}, status=status)


def add(server) -> None:
    """Add the routes to the host's server, and show it who reads what is queued."""
    server.add_on_prompt_handler(prompt_texts.on_prompt)
    server.routes.get("/personalize/runs")(get_runs)
    server.routes.get("/personalize/runs/{digest}")(get_run)
    server.routes.post("/personalize/finish")(post_finish)
    server.routes.post("/personalize/runs/delete")(post_delete)
    server.routes.post("/personalize/runs/rename")(post_rename)
    server.routes.post("/personalize/runs/reopen")(post_reopen)
    server.routes.post("/personalize/cache/delete")(post_delete_cache)


if getattr(PromptServer, "instance", None):  # a test imports the nodes without a server
    add(PromptServer.instance)
