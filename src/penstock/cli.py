"""The ``penstock`` command."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import typer
import uvloop

from penstock.core.errors import PenstockError
from penstock.observability.logs import configure
from penstock.settings import load_settings
from penstock.wiring import serve as run_server

app = typer.Typer(no_args_is_help=True)

@app.command()
def serve(engine: list[str]=typer.Option([]), model: list[str]=typer.Option([]), option: list[str]=typer.Option([]), port: int=typer.Option(None), data_dir: str=typer.Option(None), hang_timeout: float=typer.Option(None)) -> None:
    flags: dict[str, Any] = {"port": port, "data_dir": data_dir, "hang_timeout": hang_timeout}
    if model:
        opts = dict(o.split("=",1) for o in option)
        flags["models"] = [{"name": m.split("=",1)[0], "path": m.split("=",1)[1] if "=" in m else None, "engine": (engine or ["openvino"])[min(i,len(engine)-1 if engine else 0)], "options": opts} for i,m in enumerate(model)]
    settings = load_settings(flags)
    configure(settings.log_level, settings.log_format, settings.log_dir)
    uvloop.run(run_server(settings, on_listening=lambda u: print("listening", u, flush=True), progress=lambda m,w,f: None))

@app.command()
def other() -> None: ...

def main() -> None:
    try: app()
    except PenstockError as e: print(e.message, file=sys.stderr); sys.exit(1)
