"""Reads the C2PA manifest of a file: what it says, and whether it holds. Never uses the network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from omniavatar.errors import ConfigError, InputError, ResourceError
from omniavatar.text import open_regular, read_text

MOST_ANCHOR_BYTES = 2**24
UNTRUSTED = "signingCredential.untrusted"
"""Code of a signer that no given trust list names."""


@dataclass(frozen=True)
class Ingredient:
    """Something that a file was made from.

    relationship: parentOf (the file goes on from it), inputTo (it was given to the model), componentOf.
    identity: names its content, such as `ni:///sha-256;...` (RFC 6920).
    embedded: whether the manifest holds the content itself.
    problems: why its own manifest does not hold; empty if it does, or if it has none.
    """

    title: str
    relationship: str
    identity: str
    description: str = ""
    embedded: bool = False
    manifest: str | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Action:
    """What was done. source: last part of the digital source type, such as trainedAlgorithmicMedia."""

    name: str
    source: str
    agent: str
    when: str


@dataclass(frozen=True)
class Provenance:
    """The manifest of a file.

    holds: the file is unchanged since it was signed, and the signature is valid.
    trusted: whether the signer is in the given trust list; None without a list.
    problems: why it does not hold, or is not trusted.
    time: when a time stamp authority saw it; None without a time stamp.
    """

    label: str
    holds: bool
    trusted: bool | None
    problems: tuple[str, ...]
    generator: str
    signer: str
    algorithm: str
    time: str | None
    actions: tuple[Action, ...]
    ingredients: tuple[Ingredient, ...]


def load_package() -> Any:
    """The package c2pa. Raises ResourceError if it, or cryptography, is missing."""
    try:
        import c2pa
        import cryptography  # noqa: F401
    except ImportError as error:
        raise ResourceError(
            f"provenance: the package {error.name} is missing; pip install 'omniavatar[provenance]'"
        ) from None
    return c2pa


def settings_of(anchors: str | None) -> Any:
    """Settings of the package: nothing is fetched, and no previews are embedded.

    anchors: PEM certificates of the signers to trust; None for no trust list.
    """
    values: dict[str, Any] = {
        "verify": {
            "verify_after_sign": False,
            "verify_trust": True,
            "remote_manifest_fetch": False,
            "ocsp_fetch": False,
        },
        "builder": {"thumbnail": {"enabled": False}, "created_assertion_labels": ["c2pa.actions"]},
    }
    if anchors is not None:
        values["trust"] = {"user_anchors": anchors}
    return load_package().Settings.from_dict(values)


def read_provenance(
    file: Path | BinaryIO, kind: str = "video/mp4", anchors: Path | None = None
) -> Provenance:
    """The manifest of a file.

    kind: media type of the file.
    anchors: PEM file of the certificates of signers, or of their authorities, to trust.

    Raises InputError for a file without a readable manifest, ConfigError for the anchors, ResourceError.
    """
    c2pa = load_package()
    text = None if anchors is None else _anchors(anchors)
    name = file if isinstance(file, Path) else "the file"
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(open_regular(file)) if isinstance(file, Path) else file
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}); check the path") from None
        try:
            context = stack.enter_context(c2pa.Context(settings_of(text)))
            reader = stack.enter_context(c2pa.Reader(kind, stream, context=context))
            found: dict[str, Any] = json.loads(reader.json())
        except c2pa.C2paError as error:
            if "ManifestNotFound" in str(error):
                raise InputError(
                    f"{name}: has no C2PA manifest; it was never signed, or a program that does not know "
                    "manifests wrote it again"
                ) from None
            raise InputError(
                f"{name}: its manifest cannot be read ({reason(error)}); the file is damaged, or no MP4"
            ) from None
    return _provenance(found, anchors is not None)


def reason(error: Exception) -> str:
    """The text of an error of the package, as one line without its class."""
    return " ".join(str(error).split()).partition(": ")[2] or str(error)


def _anchors(path: Path) -> str:
    text = read_text(path, MOST_ANCHOR_BYTES, ConfigError)
    from cryptography import x509

    try:
        x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        raise ConfigError(f"{path}: holds no PEM certificates; give those of the signers to trust") from None
    return text


def _provenance(found: Mapping[str, Any], with_list: bool) -> Provenance:
    label = found["active_manifest"]
    manifest = found["manifests"][label]
    failures = _failures(found.get("validation_results", {}))
    broken = {code: text for code, text in failures.items() if code != UNTRUSTED}
    holds = not broken and found.get("validation_state") in ("Valid", "Trusted")
    if not holds and not broken:
        broken = {"invalid": "it is not valid"}
    trusted = found.get("validation_state") == "Trusted" if with_list else None
    problems = [*broken.values(), *(["its signer is not in the trust list"] if trusted is False else [])]
    signature = manifest.get("signature_info", {})
    names = [signature.get("common_name"), signature.get("issuer")]
    return Provenance(
        label,
        holds,
        trusted,
        tuple(problems),
        _agent((manifest.get("claim_generator_info") or [{}])[0]),
        ", ".join(dict.fromkeys(name for name in names if name)),
        str(signature.get("alg", "")),
        signature.get("time"),
        tuple(
            _action(action)
            for assertion in manifest.get("assertions", [])
            if assertion["label"].startswith("c2pa.actions")
            for action in assertion["data"].get("actions", [])
        ),
        tuple(_ingredient(each) for each in manifest.get("ingredients", [])),
    )


def _failures(results: Mapping[str, Any]) -> dict[str, str]:
    """Explanations of what does not hold, by code."""
    failures = (results.get("activeManifest") or {}).get("failure", [])
    return {each["code"]: f"{each['code']}: {each.get('explanation', '')}" for each in failures}


def _agent(values: Any) -> str:
    if not isinstance(values, Mapping):
        return str(values)
    return " ".join(str(values[name]) for name in ("name", "version") if values.get(name))


def _action(values: Mapping[str, Any]) -> Action:
    source = str(values.get("digitalSourceType", "")).rpartition("/")[2]
    when = str(values.get("when") or "")
    return Action(str(values.get("action")), source, _agent(values.get("softwareAgent", "")), when)


def _ingredient(values: Mapping[str, Any]) -> Ingredient:
    failures = _failures(values.get("validation_results") or {})
    return Ingredient(
        str(values.get("title", "")),
        str(values.get("relationship", "")),
        str(values.get("instance_id", "")),
        str(values.get("description", "")),
        values.get("data") is not None,
        values.get("active_manifest"),
        tuple(text for code, text in failures.items() if code != UNTRUSTED),
    )
