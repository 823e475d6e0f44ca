"""`omniavatar serve keys`: API keys and the secrets of their webhooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from omniavatar.cli.common import JsonOption, user_errors
from omniavatar.cli.serve_store import open_store, settings_of

if TYPE_CHECKING:
    from omniavatar.serve.jobs.keys import KeyStore

keys_app = typer.Typer(no_args_is_help=True, help="API keys.", rich_markup_mode=None)
NameArgument = Annotated[str, typer.Argument(help="Name of the key.")]


@keys_app.command("add")
def add(
    context: typer.Context,
    name: NameArgument,
    scopes: Annotated[
        str, typer.Option(help="Comma-separated: videos:read, videos:write, admin.")
    ] = "videos:read,videos:write",
    unfinished: Annotated[int | None, typer.Option(min=1, help="Most jobs that wait or run.")] = None,
    running: Annotated[int | None, typer.Option(min=1, help="Most jobs at the same time.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Most requests.")] = None,
) -> None:
    """Make a key and print it. It is shown only once."""
    from omniavatar.serve.jobs.records import KeyLimits

    limits = KeyLimits(unfinished, running, requests_per_minute)
    chosen = [scope.strip() for scope in scopes.split(",") if scope.strip()]
    _with_keys(context, lambda keys: typer.echo(keys.add(name, chosen, limits)))


@keys_app.command("list")
def list_keys(context: typer.Context, as_json: JsonOption = False) -> None:
    """List keys, their scopes and limits. Secrets cannot be shown."""

    def show(keys: KeyStore) -> None:
        from omniavatar.cli.terminal import say_json

        found = keys.list()
        if as_json:
            rows = [{**vars(key), "scopes": sorted(key.scopes), "limits": vars(key.limits)} for key in found]
            say_json(rows)
            return
        for key in found:
            state = "valid" if key.revoked_at is None else "revoked"
            typer.echo(f"{key.name}  {key.id}  {state}  {','.join(sorted(key.scopes))}")

    _with_keys(context, show)


@keys_app.command("revoke")
def revoke(context: typer.Context, name: NameArgument) -> None:
    """Make a key void at once."""
    _with_keys(context, lambda keys: keys.revoke(name))


@keys_app.command("rotate")
def rotate(
    context: typer.Context,
    name: NameArgument,
    keep_seconds: Annotated[float, typer.Option(min=0, help="How long the old secret stays valid.")] = 0.0,
) -> None:
    """Give a key a new secret and print it."""
    _with_keys(context, lambda keys: typer.echo(keys.rotate(name, keep_seconds)))


@keys_app.command("webhook-secret")
def webhook_secret(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Name of the key; none without keys.")] = None,
) -> None:
    """Print the secret with which a key's webhooks are verified."""
    from omniavatar.errors import ConfigError
    from omniavatar.serve.jobs.records import LOCAL_KEY

    def show(keys: KeyStore) -> None:
        from omniavatar.serve.api.webhooks import secret_of

        secret = settings_of(context).settings.webhook_secret
        if not secret:
            raise ConfigError("webhook_secret: is not set; set it to 32 or more random characters")
        ids = {key.name: key.id for key in keys.list()}
        if name is not None and name not in ids:
            raise ConfigError(f"key {name}: no key has this name; list the keys")
        typer.echo(secret_of(secret, LOCAL_KEY if name is None else ids[name]))

    _with_keys(context, show)


def _with_keys(context: typer.Context, action: Callable[[KeyStore], Any]) -> None:
    with user_errors():
        store, _, keys = open_store(settings_of(context).settings)
        with store:
            action(keys)
