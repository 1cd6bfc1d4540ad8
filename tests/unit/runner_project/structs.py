"""Tasks whose types come from libraries the image must have."""

from __future__ import annotations

import msgspec
import pydantic

from helmr import task


class Struct(msgspec.Struct):
    x: int


class Model(pydantic.BaseModel):
    x: int


@task
def struct(payload: Struct) -> Struct:
    return Struct(x=payload.x + 1)


@task
def model(payload: Model) -> Model:
    return Model(x=payload.x + 1)
