"""What the commands of `omniavatar serve` share: the settings, and the store they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from omniavatar.serve.jobs.files import JobFiles
    from omniavatar.serve.jobs.keys import KeyStore
    from omniavatar.serve.jobs.store import JobStore
    from omniavatar.serve.settings import LoadedSettings, ServeSettings


def settings_of(context: typer.Context) -> LoadedSettings:
    """The settings by the options of the group. Raises ConfigError, ResourceError."""
    from omniavatar.errors import ResourceError

    found: Any = context
    while not isinstance(found.obj, tuple):
        found = found.parent
    path, options = found.obj
    try:
        import omniavatar.serve.api.app  # noqa: F401
        from omniavatar.serve.settings import load_settings
    except ImportError as error:
        raise ResourceError(
            f"serve: the package {error.name} is missing; pip install 'omniavatar[serve]'"
        ) from None
    return load_settings(path, options)


def open_store(settings: ServeSettings) -> tuple[JobStore, JobFiles, KeyStore]:
    """Jobs, their files and keys. Raises OmniAvatarError."""
    from omniavatar.media.atomic import check_writable
    from omniavatar.media.temporary import remove_abandoned
    from omniavatar.serve.jobs.files import JobFiles
    from omniavatar.serve.jobs.keys import KeyStore
    from omniavatar.serve.jobs.store import JobStore

    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_writable(settings.data_dir)
    files = JobFiles(settings.files_place, settings.data_dir / "staging")
    files.check()
    remove_abandoned()
    store = JobStore.open(settings.database_url)
    return store, files, KeyStore(store.database)
