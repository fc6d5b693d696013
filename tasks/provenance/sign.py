"""A signature over a whole model folder, by OpenSSF model-signing with a key pair.

It lies beside the folder, as `DIR.sig`: within, it would be one of the files that lineage and DVC
hash, and signing would make the model another one.
"""

import re
from pathlib import Path
from typing import Any

from poemerge.documents import read_json
from poemerge.errors import SettingError, SourceError

SUFFIX = ".sig"
NAMED = re.compile(r"Hash mismatch for '([^']+)'|model '[^']*': ([^'\"]+)")


def signature_of(folder: Path) -> Path:
    """Where the signature of a folder lies, if nobody says otherwise."""
    folder = folder if folder.name.strip(".") else folder.resolve()
    return folder.with_name(folder.name + SUFFIX)


def sign(folder: Path, key: Path, signature: Path) -> None:
    """Sign every file in `folder`, its lineage included.

    Args:
        folder: of the model.
        key: private, of an elliptic curve (P-256, P-384 or P-521), in PEM, without a password.
        signature: file to write, outside the folder.

    Raises:
        SettingError: the extra is not installed, or the key or a path is refused.
    """
    _check_place(folder, signature)
    config = _library().signing.Config()
    try:
        config.use_elliptic_key_signer(private_key=key).sign(folder, signature)
    except (OSError, ValueError, TypeError) as error:
        message = (
            f"{folder} was not signed with {key} ({_first(error)}); docs/lineage.md makes one."
        )
        raise SettingError(message) from error


def check_signature(folder: Path, key: Path, signature: Path) -> None:
    """See that every file in `folder` is what the owner of the key signed, and that none was added.

    Args:
        folder: of the model.
        key: public, in PEM.
        signature: as `sign` wrote it.

    Raises:
        SettingError: the extra is not installed, or the key or a path is refused.
        SourceError: the folder is not what was signed, or somebody else signed it.
    """
    _check_place(folder, signature)
    config = _library().verifying.Config()
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - comes with the extra

    try:
        verifier = config.use_elliptic_key_verifier(public_key=key)
    except (OSError, ValueError, TypeError) as error:
        message = f"{key} is no public key of an elliptic curve in PEM ({_first(error)})."
        raise SettingError(message) from error
    try:
        read_json(signature)
        verifier.verify(folder, signature)
    except FileNotFoundError as error:
        message = f"{error.filename} does not exist; sign first, or name it with --signature."
        raise SettingError(message) from error
    except InvalidSignature as error:
        raise SourceError(f"{signature} was changed, or is by another key than {key}.") from error
    except Exception as error:  # a damaged signature makes the library raise anything
        raise SourceError(_sentence(folder, signature, error)) from error


def _library() -> Any:
    try:
        import model_signing  # noqa: PLC0415 - an extra, and 1 s
        import model_signing.signing  # noqa: PLC0415
        import model_signing.verifying  # noqa: PLC0415
    except ImportError as error:
        message = f"Signing needs {error.name}; run `pip install 'poemerge[sign]'`."
        raise SettingError(message) from error
    return model_signing


def _check_place(folder: Path, signature: Path) -> None:
    if not folder.is_dir():
        raise SettingError(f"{folder} is no folder; a signature is made of a model's whole folder.")
    if signature.resolve().is_relative_to(folder.resolve()):
        raise SettingError(
            f"{signature} lies in the folder that it signs, which would change it; put it outside."
        )


def _sentence(folder: Path, signature: Path, error: Exception) -> str:
    text = str(error).replace("\\'", "'")  # it quotes a list of sentences
    names = [one or many for one, many in NAMED.findall(text)]
    if names:
        return f"{folder} is not what was signed in {signature}: {', '.join(names)} differs."
    if text.startswith("Key mismatch"):
        return f"{signature} was made with another key; give the public key of whoever signed."
    return f"{signature} does not hold for {folder} ({_first(error)})."


def _first(error: Exception) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return " ".join((text.splitlines() or [type(error).__name__])[0].split()).rstrip(".")
