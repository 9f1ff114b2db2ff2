"""Plug-ins: distillers, losses, networks, sources and augmentations of other people, registered where they are defined.

A decorator (:func:`distiller`, :func:`loss`, :func:`network`, :func:`source`, :func:`augmentation`) registers a class or function under the
name that configurations then use. Plug-ins are loaded by ``--plugin FILE_OR_MODULE``, by importing their module, or as entry points of the
group ``raredistill`` of installed packages; a configuration alone loads nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Generic, Literal, TypeVar

from raredistill.errors import ConfigError, RareDistillError

T = TypeVar("T")
Thing = TypeVar("Thing", bound=Callable[..., Any])
Kind = Literal["distiller", "loss", "network", "source", "augmentation"]

LIMIT = 120.0
"""Seconds that the import of a plug-in may take, including its own imports."""
GROUP = "raredistill"
HINT = "a plug-in's name needs --plugin FILE_OR_MODULE"
"""End of a message about an unregistered name."""
_HOMES: dict[str, str] = {
    "distiller": "raredistill.distill.registry",
    "loss": "raredistill.losses",
    "network": "raredistill.models.names",
    "source": "raredistill.cohort.sources.registry",
    "augmentation": "raredistill.augment",
}
"""The module that holds the registry of each kind; imported when the first plug-in of that kind is registered."""


@dataclass(frozen=True)
class Plugin:
    """One registered thing.

    Attributes:
        kind: its kind.
        name: its name in configurations.
        thing: the class or function.
        facts: arguments of its decorator other than the name.
        spec: file or module that defines it, as given to ``--plugin``; empty if it was defined in a script or notebook.
        digest: hash of its source code; for a module of a package, of the whole package.
        package: the installed package that provides it as an entry point; empty for others.
    """

    kind: Kind
    name: str
    thing: Callable[..., Any]
    facts: Mapping[str, Any]
    spec: str
    digest: str
    package: str = ""

    @property
    def place(self) -> str:
        """Its origin, for messages and tables."""
        return f"{self.spec} (package {self.package})" if self.package else self.spec or "this Python session"


class Registry(Mapping[str, T], Generic[T]):
    """All things of one kind that a configuration can name: built-in ones, then those registered by plug-ins.

    Args:
        kind: kind of the things.
        built_in: built-in things by name.
        adopt: converts a plug-in to an entry of the registry; raises ConfigError if it does not fulfil the contract.
    """

    def __init__(self, kind: Kind, built_in: Mapping[str, T], adopt: Callable[[Plugin], T]) -> None:
        self._kind, self._built_in, self._adopt = kind, dict(built_in), adopt
        self._adopted: dict[str, T] = {}
        self.plugins: dict[str, Plugin] = {}
        _REGISTRIES[kind] = self

    def __getitem__(self, name: str) -> T:
        if name in self._built_in:
            return self._built_in[name]
        discover()
        return self._adopted[name]

    def __iter__(self) -> Iterator[str]:
        discover()
        return iter([*self._built_in, *self._adopted])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def plugin(self, name: str) -> Plugin | None:
        """The plug-in that registered a name; None for built-in and unknown names."""
        return self.plugins.get(name) if name in self else None

    def add(self, plugin: Plugin) -> None:
        """Add a plug-in.

        Raises:
            ConfigError: its name is taken, or it does not fulfil the contract of its kind.
        """
        if plugin.name in self._built_in:
            raise ConfigError(f"the {plugin.kind} {plugin.name} of {plugin.place} has the name of a built-in one; give it another name")
        known = self.plugins.get(plugin.name)
        if known is not None and not _redefined(known, plugin):
            where = f"{known.place} and {plugin.place}" if known.place != plugin.place else f"{plugin.place}, twice"
            raise ConfigError(f"the {plugin.kind} {plugin.name} is registered by {where}; every name may be registered once")
        self._adopted[plugin.name] = self._adopt(plugin)
        self.plugins[plugin.name] = plugin

    def remove(self, plugin: Plugin) -> None:
        """Remove a plug-in."""
        self._adopted.pop(plugin.name, None)
        self.plugins.pop(plugin.name, None)


_REGISTRIES: dict[str, Registry[Any]] = {}
_LOADED: dict[str, str] = {}
"""Digest of each plug-in loaded in this process, by the file or module that other processes load it from."""


_OBJECTS: dict[str, tuple[Callable[..., Any], str]] = {}
"""Objects of this session by name, with the hash of each."""


@dataclass
class _State:
    """The plug-in that is being loaded now."""

    spec: str = ""
    package: str = ""
    digest: str = ""
    discovered: bool = False


_STATE = _State()


def distiller(thing: Thing | None = None, /, **facts: Any) -> Any:
    """Register a distiller: a :class:`raredistill.distill.Method`, or a function of ``(student, teacher, labels)`` and options.

    Args:
        thing: the class or function; decorators with arguments are called without.
        facts: of a function: ``name`` (its own by default), ``family``, ``source``, ``needs``, ``min_classes``, ``zero_at_equal``,
            ``within_batch``, ``balances``, as :class:`raredistill.distill.Method` explains them.
    """
    return _decorated("distiller", thing, facts)


def loss(thing: Thing | None = None, /, **facts: Any) -> Any:
    """Register a loss: a function of ``(logits, target)``, options, and ``counts`` where it needs the class counts.

    Args:
        thing: the function; it returns ``(N,)`` losses, or takes ``reduction``.
        facts: ``name``, ``source``, ``carries`` (from counts and options to the class prior that the logits carry beside the sampler's),
            ``weighs`` and ``head``, as :class:`raredistill.losses.NamedLoss` explains them.
    """
    return _decorated("loss", thing, facts)


def network(thing: Thing | None = None, /, **facts: Any) -> Any:
    """Register a network: called with a number of channels, it gives a module from images ``(N, C, H, W)`` to features ``(N, F)``.

    Args:
        thing: the module's class, or a function that builds it.
        facts: ``name``.
    """
    return _decorated("network", thing, facts)


def source(thing: Thing | None = None, /, **facts: Any) -> Any:
    """Register a source of raw data: a class that keeps the contract of :class:`raredistill.cohort.sources.Source`.

    Args:
        thing: the class; its ``kind`` is the name.
        facts: none.
    """
    return _decorated("source", thing, facts)


def augmentation(thing: Thing | None = None, /, **facts: Any) -> Any:
    """Register an augmentation: a function of ``(images, draws)`` and options that gives the changed images.

    Args:
        thing: the function; see :class:`raredistill.augment.Step`.
        facts: ``name``, and ``draws``, the random numbers that it needs for each image.
    """
    return _decorated("augmentation", thing, facts)


def _decorated(kind: Kind, thing: Thing | None, facts: dict[str, Any]) -> Any:
    if thing is not None:
        register(kind, thing, facts)
        return thing
    return lambda later: _decorated(kind, later, facts)


def register(kind: Kind, thing: Callable[..., Any], facts: Mapping[str, Any]) -> None:
    """Register a class or function, as the decorators do.

    Raises:
        ConfigError: its name is no name or is taken, or it does not keep the contract of its kind.
    """
    import_module(_HOMES[kind])
    given = {key: value for key, value in facts.items() if key != "name"}
    name = facts.get("name") or getattr(thing, "kind" if kind == "source" else "name", None) or getattr(thing, "__name__", "")
    if not (isinstance(name, str) and re.fullmatch(r"[A-Za-z][\w-]*", name)):
        raise ConfigError(f"a {kind} is registered as {name!r}: a name has letters, digits, _ and -, and begins with a letter")
    spec = _STATE.spec or ("" if thing.__module__ in _SESSIONS else thing.__module__)
    in_file = _STATE.digest and thing.__module__ == module_name(Path(spec))  # else it stands in a module that the file imports
    digest = _STATE.digest if in_file else source_digest(thing)
    _REGISTRIES[kind].add(Plugin(kind, name, thing, given, spec, digest, _STATE.package))
    if spec and not _STATE.spec:
        _LOADED[spec] = digest


_SESSIONS = ("__main__", "__mp_main__")


def _redefined(known: Plugin, plugin: Plugin) -> bool:
    """Whether a plug-in was redefined by running a notebook's cell again."""
    same = known.thing.__module__, known.thing.__qualname__
    return plugin.thing.__module__ == "__main__" and same == ("__main__", plugin.thing.__qualname__)


def load(spec: str, *, package: str = "") -> None:
    """Load a plug-in and register everything it defines.

    Args:
        spec: a file ``*.py``, or the name of a module that can be imported.
        package: the installed package whose entry point names it.

    Raises:
        ConfigError: there is no such file or module, it fails, prints, takes too long or registers nothing, or a name is taken; then
            nothing of it stays registered.
    """
    key = _key(spec)
    if key in _LOADED:
        raise ConfigError(f"the plug-in {spec} is registered twice; name it once")
    before = {plugin.name: plugin for plugin in registered()}
    try:
        with _one_message(spec, package):
            _import(key, package)
            if _is_file(spec) and not any(plugin.spec == key or plugin.name not in before for plugin in registered()):
                raise ConfigError("it registers nothing; decorate a class or function with @raredistill.distiller or another decorator")
    except BaseException:
        _forget([plugin for plugin in registered() if plugin.spec == key])
        raise
    own = [plugin.digest for plugin in registered() if plugin.spec == key]
    _LOADED[key] = own[0] if own else _module_digest(sys.modules[key])


def _import(key: str, package: str) -> None:
    file = Path(key)
    if _is_file(key):
        text = _bytes(file)
        digest = _hash([("", text)])
        with _loading(key, digest, package):
            _execute(file, text)
        return
    with _loading(key, "", package):
        import_module(key)


def _execute(file: Path, text: bytes) -> None:
    """Run a file as a separate module, which stays importable under the name used by pickles and tracebacks."""
    name = module_name(file)
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module
    try:
        exec(compile(text, str(file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise


def module_name(file: Path) -> str:
    """Name of the module for a plug-in's file."""
    return f"raredistill_plugin_{re.sub(r'[^0-9A-Za-z]', '_', file.stem)}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"


def _is_file(spec: str) -> bool:
    return spec.endswith(".py") or "/" in spec or "\\" in spec


def _key(spec: str) -> str:
    """Unique name of a plug-in, valid for processes with any working directory."""
    return str(Path(spec).resolve()) if _is_file(spec) else spec


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{error.strerror}; give the path of a Python file, or the name of a module that can be imported") from None


@contextmanager
def _loading(spec: str, digest: str, package: str) -> Iterator[None]:
    before = (_STATE.spec, _STATE.digest, _STATE.package)
    _STATE.spec, _STATE.digest, _STATE.package = spec, digest, package
    said = io.StringIO()
    try:
        with redirect_stdout(said), _time_limit(LIMIT):
            yield
    finally:
        _STATE.spec, _STATE.digest, _STATE.package = before
    if said.getvalue():
        raise ConfigError(f"it prints while it is imported ({said.getvalue().strip()[:60]!r}); move that into a function")


class _TooLongError(BaseException):
    """Raised inside a plug-in when its time is up; not an Exception, so that the plug-in does not catch it."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block after a time limit; this works only in the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _one_message(spec: str, package: str) -> Iterator[None]:
    """Convert every failure during the import of a plug-in into one error that names it."""
    who = f"plug-in {spec}" + (f" (entry point of the installed package {package}; uninstall or repair it)" if package else "")
    try:
        yield
    except _TooLongError:
        raise ConfigError(f"{who}: its import did not end within {LIMIT:g} s; move long work into a function") from None
    except RareDistillError as error:
        raise ConfigError(f"{who}: {error}") from None
    except ModuleNotFoundError as error:
        missing = f"{error.name}" if error.name != spec.split(".")[0] and error.name != spec else ""
        told = f"it imports {missing}, which is not installed" if missing else "no such file or module; a file is given by its path"
        raise ConfigError(f"{who}: {told}") from None
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{who}: it fails while it is imported: {type(error).__name__}: {error}{_line(error, spec)}") from None


def _line(error: BaseException, spec: str) -> str:
    if isinstance(error, SyntaxError):
        return ""  # it names its line itself
    trace, line = error.__traceback__, None
    while trace is not None:
        line = trace.tb_lineno if Path(trace.tb_frame.f_code.co_filename) == Path(_key(spec)) else line
        trace = trace.tb_next
    return "" if line is None else f" (line {line})"


def _forget(plugins: Iterable[Plugin]) -> None:
    for plugin in plugins:
        _REGISTRIES[plugin.kind].remove(plugin)


def forget(spec: str) -> None:
    """Remove everything that a file or module registered, so that it can be loaded again."""
    key = _key(spec)
    _forget([plugin for plugin in registered() if plugin.spec == key])
    _LOADED.pop(key, None)


def registered() -> list[Plugin]:
    """All plug-ins that are registered now, in the order of their registration by kind."""
    return [plugin for kind in _HOMES if kind in _REGISTRIES for plugin in _REGISTRIES[kind].plugins.values()]


def discover() -> None:
    """Load the plug-ins of installed packages, once.

    Raises:
        ConfigError: one of them cannot be loaded; names its package.
    """
    if _STATE.discovered or _STATE.spec:
        return
    _STATE.discovered = True
    for entry in entry_points(group=GROUP):
        if entry.module not in _LOADED:
            load(entry.module, package=_package(entry))


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.name


def loaded() -> dict[str, str]:
    """The plug-ins that another process has to load, with their hashes; files and modules only, not definitions of this session."""
    return dict(_LOADED)


def load_again(known: Mapping[str, str]) -> None:
    """Load the plug-ins of the process that started this one.

    Args:
        known: the result of :func:`loaded` there.

    Raises:
        ConfigError: one cannot be loaded here, or is not the same here.
    """
    for spec, digest in known.items():
        if spec not in _LOADED:
            load(spec)
        if _LOADED[spec] != digest:
            raise ConfigError(f"the plug-in {spec} is not the same in every process: it was edited, or this machine has another copy")


def sources_of(names: Iterable[tuple[Kind, str]]) -> dict[str, str]:
    """Source hashes of the plug-ins among the given names, by ``distiller mine`` and so on; built-ins are skipped."""
    listed = list(names)
    found = {f"{kind} {name}": _REGISTRIES[kind].plugin(name) for kind, name in listed if kind in _REGISTRIES and ":" not in name}
    digests = {name: plugin.digest for name, plugin in found.items() if plugin is not None}
    return digests | {f"{kind} {name}": _object_digest(name) for kind, name in listed if ":" in name}


def keep_object(name: str, thing: Callable[..., Any], digest: str) -> None:
    """Store an object under a name for the duration of this session."""
    _OBJECTS[name] = thing, digest


def kept_object(name: str) -> Callable[..., Any] | None:
    """The object that :func:`keep_object` stored under a name."""
    return _OBJECTS[name][0] if name in _OBJECTS else None


def _object_digest(name: str) -> str:
    if name in _OBJECTS:
        return _OBJECTS[name][1]
    module = sys.modules.get(name.partition(":")[0])
    return "" if module is None else _module_digest(module)


def plugins_table() -> list[dict[str, str]]:
    """Rows of ``raredistill methods``: all plug-ins with their origin."""
    discover()
    return [{"name": plugin.name, "kind": plugin.kind, "from": plugin.place} for plugin in registered()]


def source_digest(thing: Callable[..., Any]) -> str:
    """Hash of the code that a thing depends on: its file, all files of its package, or its own text if defined in a session."""
    module = sys.modules.get(thing.__module__)
    return _hash([("", _text(thing).encode())]) if getattr(module, "__file__", None) is None else _module_digest(module)


def _module_digest(module: ModuleType | None) -> str:
    """Hash of a module's file, or of all files of its package."""
    place = getattr(module, "__file__", None)
    if module is None or place is None:
        return ""
    file, package = Path(place), sys.modules.get(module.__name__.partition(".")[0])
    roots = [Path(root) for root in getattr(package, "__path__", ())]
    files = [(str(path.relative_to(root)), path.read_bytes()) for root in roots for path in sorted(root.rglob("*.py"))]
    return _hash(files or [("", file.read_bytes())])


def _text(thing: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        raise ConfigError(
            f"the source of {thing.__qualname__} cannot be read, so a changed one would not be noticed; write it into a file"
        ) from None


def _hash(files: Iterable[tuple[str, bytes]]) -> str:
    found = hashlib.sha256()
    for name, content in files:
        found.update(f"{name}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()[:16]
