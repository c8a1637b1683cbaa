"""What a cell's checkpoint, best.safetensors, must say of itself."""

from typing import Annotated, Any, Self, get_type_hints

from pydantic import ConfigDict, Field, create_model, model_validator

from ablations.study.schema import Bytes, Checked, Count, Name, Same, Settings, Share
from core.data.sets import MOST
from core.foreign.places import Shape
from core.vit import VitConfig

Pixel = Annotated[float, Field(gt=-1e6, lt=1e6)]  # of a channel, the range of whose values is 1


class Closed(Checked):
    """The same, without further keys."""

    model_config = ConfigDict(extra="forbid")


def _closed(kind: type) -> Any:
    """What has the fields of a config, all of them and no others; their values it checks itself."""
    typed: Any = {name: (Count if hint is int else hint, ...) for name, hint in get_type_hints(kind).items()}
    return create_model(kind.__name__, __base__=Closed, **typed)


Ours: Any = _closed(VitConfig)
Others: Any = _closed(Shape)
Resolved: Any = create_model("Resolved", __base__=Settings, image=(Annotated[int, Field(ge=1, le=MOST)], ...))


class About(Checked):
    """What best.safetensors says of itself."""

    arm: Name
    seed: Bytes
    accuracy: Share
    data: str
    classes: Annotated[list[str], Field(min_length=1)]
    mean: Annotated[list[Pixel], Field(min_length=1, max_length=MOST)]
    std: Annotated[list[Annotated[Pixel, Field(gt=0)]], Field(min_length=1, max_length=MOST)]
    config: Ours | Others
    recipe: Resolved
    identity: Same | None = None

    @model_validator(mode="after")
    def _of_the_same_channels(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations of channels")
        return self
