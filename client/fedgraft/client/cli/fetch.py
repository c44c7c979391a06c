"""``fedgraft fetch``: import a backbone that the site already has, without the network."""

import re
from pathlib import Path
from typing import Annotated

import typer

from fedgraft.common.console import Console
from fedgraft.common.errors import BackboneError, InputError

__all__ = ["fetch"]


def fetch(
    path: Annotated[Path, typer.Argument(help="Folder of the model: config, weights, tokenizer.")],
    site: Annotated[Path, typer.Option(help="The site's own file.")] = Path("site.toml"),
    digest: Annotated[
        str | None, typer.Option(metavar="sha256:HEX", help="Refuse it if it has another digest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Import a local copy of a backbone into the site's store; say its digest and licence."""
    from fedgraft.client.membership.state_files import BACKBONES
    from fedgraft.client.site_config import load_site
    from fedgraft.common.backbones.blob_store import BlobStore, make_manifest

    wanted = _read_digest(digest)
    state = Path(load_site(site).state)
    if not path.is_dir():
        raise InputError(f"no folder {path}", hint="name the folder with the model's config.json")
    console = Console(as_json=as_json)
    with console.transfer("hashing") as progress:
        manifest = make_manifest(path, source=path.resolve().name, progress=progress)
    if wanted not in (None, manifest.digest):
        raise BackboneError(
            f"{path} has the digest sha256:{manifest.digest}, not the one asked for",
            hint="it is another model, another version, or a damaged copy: nothing was stored",
        )
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with console.transfer("storing") as progress:
        folder = BlobStore(state / BACKBONES).import_folder(path, manifest, progress=progress)
    console.json(
        {
            "name": manifest.source,
            "digest": f"sha256:{manifest.digest}",
            "bytes": manifest.size,
            "files": [file.name for file in manifest.files],
            "licence": manifest.licence or None,
            "folder": str(folder),
        }
    )
    console.text(
        f"{manifest.source}: {manifest.size / 1e6:,.1f} MB in {len(manifest.files)} files, "
        f"licence {manifest.licence or 'not stated'}\n"
        f"stored in {folder}\n"
        "to allow it, write into policy.toml under [model.allowed_backbones]:\n"
        f'"{manifest.source}" = "sha256:{manifest.digest}"'
    )


def _read_digest(text: str | None) -> str | None:
    if text is None:
        return None
    found = re.fullmatch(r"(?:sha256:)?([0-9a-f]{64})", text)
    if not found:
        raise InputError(
            f"{text} is no digest", hint="sha256: and 64 hex digits, as fedgraft fetch prints it"
        )
    return found[1]
