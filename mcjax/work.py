"""The folders of a run that compresses: what it makes, and what the next run goes on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mcjax.atomic import whole
from mcjax.bitplane import BitPlanes
from mcjax.hub import read_json


class Work(NamedTuple):
    """Where a run keeps what it, or the next one, goes on from.

    Attributes:
      out: the artifact, as far as it is made.
      beside: all else; gone once the artifact is at its place.
    """

    out: Path
    beside: Path

    @classmethod
    def of(cls, out: Path) -> Work:
        """The folders of a run that writes `out`, beside it."""
        return cls(*(out.parent / f".{out.name}.{name}" for name in ("partial", "work")))

    @property
    def identity(self) -> Path:
        """What the run makes of what: another one's work is not gone on with."""
        return self.beside / "identity.json"

    @property
    def at_once(self) -> Path:
        """How much the run works on at once, if it keeps to some memory."""
        return self.beside / "at_once.json"

    @property
    def tuning(self) -> Path:
        """What an interrupted tuning goes on from."""
        return self.beside / "tuning.npz"

    @property
    def untuned(self) -> Path:
        """Where layers are from which tuning began, once its own have taken their place."""
        return self.beside / "untuned"

    def seen(self, i: int) -> Path:
        """A folder for what calibration saw at layer i, see `mcjax.compress`."""
        return self.beside / f"seen_{i}"

    def made(self, i: int) -> Path:
        """A folder for the planes of layer i that are made, see `keeping`."""
        return self.beside / f"made_{i}"

    def costs(self, when: str) -> Path:
        """What parts cost, a JSON file; beside it is a folder in which that is measured."""
        return self.beside / f"costs_{when}.json"

    def record(self, i: int) -> Path:
        """What the manifest says of layer i, once the layer is made."""
        return self.beside / f"layer_{i}.json"

    def entering(self, i: int) -> Path:
        """What goes into layer i, float32 [N, T, D]; after the last, what that gives."""
        return self.beside / f"entering_{i}.npy"

    def is_of(self, identity: dict[str, Any]) -> bool:
        """Whether what is there was done by a run of that identity."""
        there = self.identity.exists()
        return there and read_json(self.identity) == json.loads(json.dumps(identity))

    def prepare(self, identity: dict[str, Any], resume: bool) -> None:
        """Makes the folders: empty, or with what is done if it is to be resumed.

        Raises:
          ValueError: if what is done is another run's.
        """
        if resume and self.out.exists() and self.identity.exists():
            if not self.is_of(identity):
                raise ValueError(
                    f"{self.out} was left by a run with another model, text or options; remove it "
                    "or run without --resume"
                )
            shutil.rmtree(self.out / "rest", ignore_errors=True)
            if self.untuned.exists():
                shutil.rmtree(self.out / "layers", ignore_errors=True)
                self.untuned.rename(self.out / "layers")
            return
        self.clear()
        for folder in self:
            folder.mkdir()
        write_json(self.identity, identity)

    def clear(self) -> None:
        """Removes both folders, and first what says that they can be gone on with."""
        self.identity.unlink(missing_ok=True)
        for folder in self:
            shutil.rmtree(folder, ignore_errors=True)


Keep = Callable[[str, Callable[[], dict[str, BitPlanes]]], dict[str, BitPlanes]]
"""From a name and what makes some planes to these, by names of their own."""


def keeping(folder: Path) -> Keep:
    """Keeps planes in files, so that each is made once however often a run is interrupted."""

    def keep(name, make):
        file = folder / f"{name}.npz"
        if file.exists():
            with np.load(file) as held:
                facts = json.loads(str(held["facts"]))
                return {own: _planes(held, own, one) for own, one in facts.items()}
        made, facts = make(), {}
        arrays: dict[str, Any] = {}
        for own, planes in made.items():
            arrays[f"{own}/planes"] = np.asarray(planes.planes)
            for k, table in zip(planes.widths, planes.tables, strict=True):
                arrays[f"{own}/{k}"] = np.asarray(table)
            facts[own] = {name: getattr(planes, name) for name in FACTS}
        folder.mkdir(exist_ok=True)
        with whole(file) as aside:
            np.savez(aside, facts=np.array(json.dumps(facts)), **arrays)
        return made

    return keep


FACTS = ("widths", "d_in", "group_size", "rotated")
"""What planes say of themselves."""


def _planes(held: Any, own: str, facts: dict[str, Any]) -> BitPlanes:
    widths = tuple(facts["widths"])
    tables = tuple(jnp.asarray(held[f"{own}/{k}"]) for k in widths)
    facts = {**facts, "widths": widths}
    return BitPlanes(planes=jnp.asarray(held[f"{own}/planes"]), tables=tables, **facts)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    with whole(path) as aside:
        aside.write_text(json.dumps(value))
