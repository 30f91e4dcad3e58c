"""As much of Ray as pools and the scheduler's side use: actors in this process that a test kills and answers for."""

from types import SimpleNamespace
from typing import Any

from ray.exceptions import RayActorError


class Reference:
    """What a call returned; open until a test answers it or kills the actor."""

    def __init__(self, actor: "Actor", method: str, arguments: tuple[Any, ...]) -> None:
        self.actor = actor
        self.method = method
        self.arguments = arguments
        self.is_over = False
        self.result: Any = None
        self._callbacks: list[Any] = []

    def answer(self, result: Any) -> None:
        self.is_over, self.result = True, result
        for callback in self._callbacks:
            callback(self)

    def future(self) -> "Reference":
        return self

    def exception(self) -> BaseException | None:
        return self.result if isinstance(self.result, BaseException) else None

    def add_done_callback(self, callback: Any) -> None:
        self._callbacks.append(callback)


class Actor:
    """A handle, and what was asked through it.

    Attributes:
        options: that it was made with.
        calls: in order.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.calls: list[Reference] = []
        self.is_alive = True

    def __getattr__(self, method: str) -> Any:
        def remote(*arguments: Any) -> Reference:
            reference = Reference(self, method, arguments)
            self.calls.append(reference)
            if not self.is_alive:
                reference.answer(RayActorError())
            return reference

        return SimpleNamespace(remote=remote)

    def die(self) -> None:
        self.is_alive = False
        for reference in self.calls:
            if not reference.is_over:
                reference.answer(RayActorError())

    def asked(self, method: str) -> list[Reference]:
        return [reference for reference in self.calls if reference.method == method]


class FakeRay:
    """Stands in for the module.

    Attributes:
        actors: all that were made, in order.
    """

    def __init__(self) -> None:
        self.actors: list[Actor] = []

    def remote(self, _actor_class: Any) -> Any:
        return SimpleNamespace(options=self._options)

    def _options(self, **options: Any) -> Any:
        def make(*_arguments: Any) -> Actor:
            self.actors.append(Actor(options))
            return self.actors[-1]

        return SimpleNamespace(remote=make)

    def get_actor(self, name: str, *, namespace: str) -> Actor:
        for actor in self.actors:
            if actor.options.get("name") == name and actor.is_alive:
                return actor
        raise ValueError(name)

    def wait(self, references: list[Reference], *, timeout: float) -> Any:
        del timeout  # nothing happens meanwhile
        done = [reference for reference in references if reference.is_over]
        return done, [reference for reference in references if not reference.is_over]

    def get(self, reference: Reference) -> Any:
        assert reference.is_over
        if isinstance(reference.result, BaseException):
            raise reference.result
        return reference.result

    def kill(self, actor: Actor) -> None:
        actor.die()

    def init(self, **_options: Any) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def alive(self) -> list[Actor]:
        return [actor for actor in self.actors if actor.is_alive]
