"""Where the host keeps model files, and the models that come with the pack."""

from __future__ import annotations

import os
import re
from pathlib import Path

import folder_paths

from ...sdg_core.avatars import BUNDLED, latent_model_file
from ..inputs import shown

BUNDLED_NAME = "avatars (bundled)"
FOLDERS = {
    "noisy_clip": {".safetensors", ".pt", ".pth"},
    "adm": {".safetensors", ".pt", ".pth"},
    "open_clip": {".safetensors", ".pt", ".pth", ".bin"},
    "classifier": {".safetensors", ".pt", ".pth"},
    "sdg_presets": {".json"},
}
LONGEST_NAME = 200
"""Bytes of a file's name: file systems allow 255, and an ending and a number are added."""


def register_folders() -> None:
    """Makes models/noisy_clip, models/adm and the others known, beside what extra_model_paths.yaml says.

    ``add_model_folder_path`` would do, but it gives a new folder no list of extensions, and then every file is listed.
    """
    for name, extensions in FOLDERS.items():
        paths, _ = folder_paths.folder_names_and_paths.get(name, ([], set()))
        own = os.path.join(folder_paths.models_dir, name)
        folder_paths.folder_names_and_paths[name] = (paths if own in paths else [*paths, own], extensions)


def bundled_files(folder: str) -> dict[str, tuple[Path, str | None]]:
    """Names of the models of a kind that come with the pack, their files, and the face of an ADM (see ``read_adm``).

    The pixel world is in the repository, not in the registry's package: only what is there is offered.
    """
    files = {
        "adm": {f"avatars latent {k} (bundled)": latent_model_file(k, BUNDLED) for k in ("v", "eps", "flow")},
        "noisy_clip": {"avatars latent (bundled)": (BUNDLED / "latent" / "noisy_clip.safetensors", None)},
        "classifier": {"avatars latent (bundled)": (BUNDLED / "latent" / "classifier.safetensors", None)},
        "open_clip": {BUNDLED_NAME: (BUNDLED / "latent" / "clip.safetensors", None)},
    }.get(folder, {})
    pixels = {} if folder in ("open_clip", "classifier") else {BUNDLED_NAME: (BUNDLED / f"{folder}.safetensors", None)}
    return {name: file for name, file in {**files, **pixels}.items() if file[0].is_file()}


def model_names(folder: str) -> list[str]:
    """What a loader offers: the bundled models, then the files of the model folder."""
    return [*bundled_files(folder), *folder_paths.get_filename_list(folder)]


def model_file(folder: str, name: str) -> tuple[Path, str | None]:
    """The file behind a name of ``model_names``, and the face of an ADM. Raises ValueError where it is missing."""
    if name.endswith("(bundled)"):
        file = bundled_files(folder).get(name)
        if file is None or not file[0].is_file():
            raise ValueError(
                f"The bundled model {name} is missing. The latent ones come with every installation (install this node "
                f"pack again), those of pixels with its repository only. Or choose a file in models/{folder}."
            )
        return file
    found = folder_paths.get_full_path(folder, name)
    if found is None:
        raise ValueError(f"There is no file {name} in models/{folder}. Put it there, or choose another.")
    return Path(found), None


def model_path(folder: str, name: str) -> Path:
    """The file of ``model_file``."""
    return model_file(folder, name)[0]


def latent_world_file(name: str) -> Path:
    """A file of the bundled latent models. Raises ValueError where it is missing."""
    path = BUNDLED / "latent" / f"{name}.safetensors"
    if not path.is_file():
        raise ValueError(f"{path.name} of the bundled latent models is missing. Install this node pack again.")
    return path


def download_folder(folder: str) -> Path:
    """Where downloads of a kind of model go."""
    return Path(folder_paths.get_folder_paths(folder)[0])


def free_path(folder: str, name: str, ending: str) -> Path:
    """Where a new file of a model folder goes, numbered where its name is taken. Raises ValueError for names that are
    none."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w][\w .()+-]*", name) or len(name.encode()) > LONGEST_NAME:
        raise ValueError(
            f'Got the name {shown(name)}; wanted a plain file name of letters, digits, spaces, "_", "-" and ".", '
            f"{LONGEST_NAME} bytes at most. Choose another."
        )
    place = download_folder(folder)
    place.mkdir(parents=True, exist_ok=True)
    number, path = 1, place / f"{name}{ending}"
    while path.exists():
        number += 1
        path = place / f"{name}_{number:02d}{ending}"
    return path


def read_text(path: Path) -> str:
    """What a text file says. Raises ValueError where it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not a text in UTF-8. Choose another file.") from error


def fingerprint(folder: str, name: str) -> str:
    """Changes when the file does, so that the host's cache of the loaded model does too."""
    path = model_path(folder, name)
    stat = path.stat()
    return f"{path}:{stat.st_mtime_ns}:{stat.st_size}"
