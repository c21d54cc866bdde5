"""The client at work: images to streams and messages, whatever its networks run on.

`codec/client_codec.py` runs them in torch, `mantis_lite` in onnxruntime. Shapes: B batch, K tasks,
H W input pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, Self, TypeVar

from mantis_core.bitstream.coder import TableSet
from mantis_core.bitstream.container import StreamSpec
from mantis_core.bitstream.wire import CodedImage, write_stream
from mantis_core.device.facts import ClientFacts
from mantis_core.device.look import Looker, Network, Seen
from mantis_core.device.requests import Budget, Tasks, Way, check_images, family_of
from mantis_core.device.sessions import ClientSession
from mantis_core.errors import ModelError

Images = TypeVar("Images")


class DeviceClient(Generic[Images]):
    """Turns images into streams. Holds no decoder and no weight of one.

    `extensions` are clients of the same networks for tasks that came later, which have streams of
    their own. `families` are the tasks of this client and of each of them, of which this one is
    number `family`.
    """

    array_type: type
    """What holds images, and `array_name`, what messages call it."""
    array_name: str

    def __init__(
        self,
        facts: ClientFacts,
        network: Network,
        tables: TableSet,
        stream_spec: StreamSpec,
        mask_threshold: float,
    ) -> None:
        self.facts, self.network = facts, network
        self.tables, self.stream_spec = tables, stream_spec
        self.looker = Looker(facts, network, mask_threshold, stream_spec)
        self.extensions: tuple[Self, ...] = ()
        self.families: tuple[tuple[str, ...], ...] = (facts.tasks,)
        self.family = 0

    def extend(self, extensions: Sequence[Self]) -> None:
        """Takes the clients for tasks that came later."""
        self.extensions = tuple(extensions)
        families = (self.facts.tasks, *(own.facts.tasks for own in extensions))
        for number, own in enumerate((self, *extensions)):
            own.families, own.family = families, number

    def for_tasks(self, tasks: Tasks) -> Self:
        """The client that codes for `tasks`: this one, or one of its extensions.

        What is detected or given as an array is coded by this one. Raises ModelError for tasks that
        are sent in separate streams.
        """
        if not self.extensions:
            return self
        return (self, *self.extensions)[family_of(self.families, tasks)]

    def encode(
        self,
        images: Images,
        tasks: Tasks = None,
        *,
        exit_confidence: float | None = None,
        level: int | None = None,
        max_bytes: int | None = None,
    ) -> list[bytes]:
        """uint8 images (B, 3, H, W) to one stream each.

        With `tasks` None they are detected. A name or several ask for these tasks alone, of every
        image; a bool array (B, K) asks image by image, and one of (1, K) the same of all.
        `exit_confidence` is a probability: where the detector gives an image's class at least that
        much, the client answers itself, and the stream holds the answer and no latent (early exit,
        after Teerapittayanon et al., ICPR 2016). Where tasks are asked for it counts for one task
        alone, of a client with exit heads.

        A model of several rates has levels: `level` 0, which None stands for, gives the largest
        streams and the best answers. With `max_bytes` each image is coded at the lowest level whose
        stream takes no more bytes; where none does, the client answers itself if it can. Raises
        ModelError for an unknown name, for tasks that are sent in separate streams, for images or
        tasks of another kind, for an `exit_confidence` where the client cannot answer itself, for a
        level that the model has not, and for an image that `max_bytes` do not hold.
        """
        own = self.for_tasks(tasks)
        budget = own.budget(max_bytes)
        looked = own.look(
            images, tasks, exit_confidence=exit_confidence, level=level, budget=budget
        )
        return [own._file(seen.image, seen.input_shape) for seen in looked]

    def look(
        self,
        images: Images,
        tasks: Tasks = None,
        *,
        exit_confidence: float | None = None,
        level: int | None = None,
        budget: Budget | None = None,
    ) -> Iterator[Seen]:
        """The task field and symbols of each of `images`; arguments and errors as `encode`.

        The tasks are this client's own, not those of its extensions: see `for_tasks`.
        """
        self.check_images(images)
        way = Way(tasks, exit_confidence, level, budget)
        for (seen,) in self.looker.look(images, [way]):
            yield seen

    def open(
        self,
        *,
        request: str | Sequence[str] | None = None,
        requests: bool | None = None,
        input_shape: tuple[int, int] | None = None,
    ) -> ClientSession:
        """A session of this client; arguments and errors as `ClientSession`.

        With a `request` for tasks of an extension it is a session of that one's streams.
        """
        own = self.for_tasks(request)
        return ClientSession(own, input_shape=input_shape, requests=requests, request=request)

    def write_together(self, images: Sequence[Seen]) -> bytes:
        """One stream of images of one shape that `look` has seen.

        Raises BitstreamError (too_large) for more than a stream may hold.
        """
        shapes = {seen.input_shape for seen in images}
        if len(shapes) != 1:
            raise ModelError(f"images of {sorted(shapes)} pixels; a stream holds one shape")
        coded = [seen.image for seen in images]
        return write_stream(coded, shapes.pop(), self.tables, self.stream_spec).data

    def budget(self, max_bytes: int | None) -> Budget | None:
        """What bounds the stream of each image; None without a bound."""
        return None if max_bytes is None else Budget(max_bytes, self._file)

    def check_images(self, images: object) -> None:
        """ModelError for what is no batch of images."""
        check_images(images, self.array_type, self.array_name)

    def _file(self, image: CodedImage, input_shape: tuple[int, int]) -> bytes:
        return write_stream([image], input_shape, self.tables, self.stream_spec).data
