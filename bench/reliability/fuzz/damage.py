"""Damage to files: ``.h5ad`` at the level of HDF5 or of bytes, and the files of a RUN folder."""

import hashlib
import json
import os
import shutil
from contextlib import suppress

import h5py
import numpy as np

from bench.reliability.fuzz import bases
from wbdit._outputs import MANIFEST, RUN_FILES
from wbdit.checkpoint import state_hash

ENCODINGS = ["array", "string-array", "csr_matrix", "csc_matrix", "dataframe", "dict", "categorical", "anndata", "raw"]
ENCODINGS += [
    "nullable-boolean",
    "nullable-integer",
    "numeric-scalar",
    "string",
    "rec-array",
    "null",
    "awkward-array",
    "?",
]
KINDS = ["f2", "f4", "f8", "i1", "i4", "i8", "u1", "u4", "u8", "c8", "?", "S3"]


def damage_h5ad(dice, content, path):
    """Write a damaged copy of a file; return whether its bytes were changed, rather than its parts."""
    if dice.chance(0.2):
        path.write_bytes(dice.bytes(content))
        return True
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        for _ in range(1 + (dice.below(3) if dice.chance(0.5) else 0)):
            with suppress(Exception):  # what h5py refuses to write is no file
                _damage_part(dice, file)
    return False


def _damage_part(dice, file):
    names = []
    file.visit(names.append)
    name = dice.of(["/", *names]) if dice.chance(0.2) else dice.of(names)
    if dice.chance(0.4):  # the matrices most of all
        chosen = [own for own in names if own.split("/")[0] in ("X", "raw", "layers", "obsp")]
        name = dice.of(chosen)
    part = file[name]
    if len(part.attrs) and dice.chance(0.3):
        _damage_attribute(dice, part)
    elif isinstance(part, h5py.Dataset):
        _damage_dataset(dice, file, name, part)
    else:
        _damage_group(dice, file, name, part)


def _damage_attribute(dice, part):
    key = dice.of(part.attrs)
    kind = dice.below(6)
    if kind == 0:
        del part.attrs[key]
    elif key == "encoding-type":
        part.attrs[key] = dice.of(ENCODINGS)
    elif key == "shape":
        part.attrs[key] = dice.of(
            [[dice.of([10**12, -1, 0, 5, 13, 2**62]), dice.of([9, 10**12, 0, -3, 8])], [9], 7, [1.5, 2.0], [[12, 9]]]
        )
    elif kind < 4:
        value = dice.of(
            [
                dice.text().replace("\0", "").replace("\ud800", "?"),
                dice.number(),
                [dice.text().replace("\0", "").replace("\ud800", "?")],
            ]
        )
        part.attrs[key] = value
    else:
        part.attrs[dice.of(["shape", "_index", "column-order", "h5sparse_format", "encoding-type"])] = dice.of(
            [[3, 4], "csr", "x", 5]
        )


def _damage_group(dice, file, name, part):
    kind = dice.below(7)
    if kind == 0 and name != "/":
        del file[name]
    elif kind == 1:
        part.create_group(dice.of(["new", "wbdit", "x y"]))
    elif kind == 2:
        part["ring"] = file["/"] if dice.chance(0.5) else part
    elif kind == 3:
        part["link"] = dice.of(
            [h5py.SoftLink("/nowhere"), h5py.SoftLink("/"), h5py.ExternalLink("/etc/passwd", "/"), h5py.SoftLink("/X")]
        )
    elif kind == 4 and name != "/":
        del file[name]
        file[name] = dice.of([np.arange(3), "text", np.zeros((12, 9), "f4"), np.float64(dice.of([1.0, np.nan]))])
    elif kind == 5:
        members = list(part)
        if len(members) > 1:
            one, other = dice.of(members), dice.of(members)
            part.move(one, "aside")
            part.move(other, one)
            part.move("aside", other)
    else:
        child = dice.of(part)
        part.move(child, dice.of(["moved", "X", "obs", "data", "indices"]))


def _damage_dataset(dice, file, name, part):
    values, attributes = part[()], dict(part.attrs)
    array = np.asarray(values)
    kind = dice.below(12)
    if kind == 0:
        new = None
    elif kind == 1 and array.ndim:
        new = array[: dice.below(len(array) + 1)]
    elif kind == 2 and array.dtype.kind in "biufc":
        new = array.astype(dice.of(KINDS))
    elif kind in (3, 4, 5) and array.dtype.kind in "iuf" and array.size:
        new = array.copy().reshape(-1)
        for _ in range(1 + dice.below(3)):
            value = dice.number()
            with suppress(OverflowError, ValueError):
                new[dice.below(len(new))] = value
        new = new.reshape(array.shape)
    elif kind == 6:
        new = array.reshape((*array.shape, 1)) if dice.chance(0.5) else array.reshape(-1)
    elif kind == 7:
        shape = dice.of([(10**12,), (10**7, 10**6), (0,), (2**40, 9), (3 * 10**8,)])
        del file[name]
        file.create_dataset(name, shape=shape, dtype=dice.of(KINDS), chunks=True, compression=dice.of([None, "gzip"]))
        file[name].attrs.update(attributes)
        return
    elif kind == 8:
        new = np.array(
            [dice.text().replace("\0", "").replace("\ud800", "?") for _ in range(max(1, array.size))], dtype=object
        )
    elif kind == 9:
        new = np.concatenate([array.reshape(-1)] * 2)
    elif kind == 10 and array.ndim:
        new = array[dice.rng.permutation(len(array))]
    elif kind == 11 and array.ndim:
        new = np.full_like(array, array.reshape(-1)[0]) if array.size else array
    else:
        new = dice.of([np.arange(12), np.zeros(0), np.float32(1), np.array([b"a", b"b"])])
    del file[name]
    if new is not None:
        if new.dtype == object:
            file.create_dataset(name, data=new, dtype=h5py.string_dtype())
        else:
            file[name] = new
        file[name].attrs.update(attributes)


def damage_run(dice, runs, kind, folder):
    """Write a damaged copy of a RUN folder."""
    own = dict(runs[kind])
    for _ in range(1 + (dice.below(3) if dice.chance(0.3) else 0)):
        name = dice.of(["config.json", "preprocessor.json", "preprocessor.safetensors", "model.safetensors"])
        if dice.chance(0.05):
            name = dice.of(own)
        if not isinstance(own.get(name), bytes):
            continue
        way = dice.below(20)
        if way == 0:
            own[name] = dice.bytes(own[name])
        elif way == 1:
            own[name] = runs[dice.of(runs)].get(name, b"")
        elif way == 2:
            own[name] = dice.of(
                [
                    None,
                    b"",
                    "folder",
                    "ring",
                    "pipe",
                    b"\x80\x02}",
                    b"PK\x03\x04",
                    own[name][: dice.below(len(own[name]) + 1)],
                ]
            )
        elif name.endswith(".json"):
            own[name] = _damage_json(dice, own[name])
        elif name.endswith(".safetensors"):
            with suppress(Exception):  # damaged before, beyond what can be read
                own[name] = _damage_tensors(dice, own[name])
    if dice.chance(0.7):
        _sign(own)
    _write(folder, own)


def _damage_json(dice, content):
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):
        return content
    for _ in range(1 + dice.below(2)):
        at, path = whole, []
        while isinstance(at, (dict, list)) and len(at) and (not path or dice.chance(0.8)):
            key = dice.of(at) if isinstance(at, dict) else dice.below(len(at))
            path.append((at, key))
            at = at[key]
        if not path:
            return content
        parent, key = path[-1]
        way = dice.below(10)
        if way == 0:
            del parent[key]
        elif way == 1:
            parent[key] = str(at)
        elif way == 2 and isinstance(at, (int, float)):
            parent[key] = float(at) if dice.chance(0.5) else -at
        elif way == 3 and isinstance(parent, list):
            parent.insert(key, at)
        elif way == 4 and isinstance(parent, dict):
            parent[dice.text()] = at
        elif way == 5:
            parent[key] = [at]
        elif way == 6 and dice.chance(0.2):
            parent[key] = "@deep@"
        else:
            parent[key] = dice.value()
    text = json.dumps(whole)
    opening, closing = dice.of([("[", "]"), ('{"a":', "}"), ("[", "")])
    size = dice.of([500, 100_000])
    return text.replace('"@deep@"', opening * size + ("1" if opening != "[" else "") + closing * size).encode()


def _damage_tensors(dice, content):
    size = int.from_bytes(content[:8], "little")
    if dice.chance(0.25):  # the header alone
        header = _damage_json(dice, content[8 : 8 + size])
        length = len(header) if dice.chance(0.9) else dice.of([0, 2**40, 2**63 - 1, len(header) + 5])
        return length.to_bytes(8, "little") + header + content[8 + size :]
    arrays, metadata = bases.tensors(content)
    for _ in range(1 + dice.below(2)):
        name = dice.of(arrays)
        array, way = arrays[name], dice.below(11)
        if way == 0:
            del arrays[name]
        elif way == 1:
            arrays[dice.of(["x", name + "x", ""])] = array
        elif way == 2:
            arrays[name] = array.astype(dice.of(["f2", "f4", "f8", "i4", "i8", "u1", "?"]))
        elif way == 3:
            arrays[name] = array.reshape(-1) if dice.chance(0.5) else array[None]
        elif way == 4 and array.ndim:
            arrays[name] = array[: dice.below(len(array))]
        elif way == 5:
            arrays[name] = array * array.dtype.type(dice.of([0, -1, 100, 2]))
        elif way == 6 and array.ndim:
            arrays[name] = np.concatenate([array, array])
        elif way == 7:
            arrays[name] = np.zeros((0, 10**12), array.dtype)
        elif array.size:
            flat = array.copy().reshape(-1)
            where = slice(None) if dice.chance(0.3) else dice.below(len(flat))
            flat[where] = dice.number()
            arrays[name] = flat.reshape(array.shape)
    if metadata and dice.chance(0.2):
        metadata = {
            "facts": dice.of(
                ["[" * 100_000, "5", "{}", "null", _damage_json(dice, metadata.get("facts", "{}").encode()).decode()]
            )
        }
    return bases.saved(arrays, metadata)


def _sign(own):
    """Make all hashes fit the damaged files, as whoever means harm would."""
    with suppress(Exception):
        import torch

        arrays, _ = bases.tensors(own["model.safetensors"])
        config = json.loads(own["config.json"])
        if config["model_hash"]:
            config["model_hash"] = state_hash({name: torch.from_numpy(array) for name, array in arrays.items()})
            own["config.json"] = json.dumps(config).encode()
    for folder in ("", "previous/"):
        files = {}
        for name in RUN_FILES:
            content = own.get(folder + name)
            if isinstance(content, bytes):
                files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        if files:
            own[folder + MANIFEST] = json.dumps({"files": files}).encode()


def _write(folder, own):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in own.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content == "ring":
            path.symlink_to(path)
        elif content == "pipe":
            os.mkfifo(path)
