"""Define `Pass`, the base class of all passes, and `Decline`, by which a rule says that it does not apply.

A pass is a frozen dataclass with a `name`, a docstring with `Before:` and `After:`, and typed fields, which are its
options on the command line. Defining a subclass with a `name` registers it.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Sequence
from typing import ClassVar

import onnx_ir

from passopt.ir.errors import PassError
from passopt.passes.framework.accuracy import EXACT, Accuracy
from passopt.passes.framework.records import PassResult


class Decline(Exception):
    """Say that a rule does not apply at the place where its pattern matched, and why.

    A `rewrite` method raises it, and the matched nodes then stay as they are. This is no error: the driver counts the
    reason, and `passopt run --stats`, `passopt why` and unmet expectations show it. If the model or an option of the
    user is wrong, raise `PassError` instead.

    Args:
        reason: A sentence without a final period that names the value, what was expected and what was found.

    Example:
        ``raise Decline(f"Swish needs opset 24, this model has {op.opset}")``
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Refusal:
    """A node that a whole-graph pass leaves unchanged, and the reason, as `passopt why` shows it.

    Attributes:
        node: The node that stays as it is; None if the reason concerns the whole graph.
        reason: Why the pass does not change it, such as "its inputs are not constant".

    Example:
        ``yield Refusal(node, f"{node.inputs[0].name} is not constant")`` in the method `explain` of a pass.
    """

    node: onnx_ir.Node | None
    reason: str


#: All passes whose modules were imported, by their names.
REGISTERED: dict[str, type[Pass]] = {}


class Pass(abc.ABC):
    """The base class of all passes: subclass `RewritePass` to write rules, and this class for whole-graph work.

    A pass is a frozen dataclass; its fields are its options, such as `shard{degree=2}`. It holds no state of a model,
    changes the model in place in `run`, and must find nothing more to do when it runs a second time.

    Attributes:
        name: The name on the command line, such as "fuse-rms-norm". A subclass that sets it is registered; one that
            does not set it is taken as a base class. Two passes of one name raise PassError.
        after: Names of passes that must run earlier if the pipeline has them at all. The order of a pipeline is
            checked against this, and never changed.
        makes: The operators that show the success of the pass, such as "Attention" or "passopt::AlibiAttention". An
            expectation `PASS==N` counts these nodes in the final graph instead of the matches, or before the first
            later pass that takes them apart.
        decomposes: The operators that this pass takes apart on purpose.
        accuracy: EXACT, REASSOCIATED or lossy(budget), which `--verify-each=numeric` checks.
        changes_interface: True if the pass changes the dtype or shape of graph inputs or outputs by design. Such a
            change is an error otherwise.

    Example:
        A whole-graph pass without options::

            @dataclasses.dataclass(frozen=True)
            class DropIdentity(Pass):
                '''Remove operators that only hand on their input.

                Before: ``y = Relu(Identity(x))``
                After:  ``y = Relu(x)``
                '''

                name = "drop-identity"

                def run(self, model: onnx_ir.Model) -> PassResult:
                    editor, removed = Editor(model, self.name), 0
                    for node in list(model.graph):
                        if node.op_type == "Identity" and not node.outputs[0].is_graph_output():
                            node.outputs[0].replace_all_uses_with(node.inputs[0])
                            editor.remove_dead([node])
                            removed += 1
                    return PassResult(modified=removed > 0, matches=removed)
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    makes: ClassVar[tuple[str, ...]] = ()
    decomposes: ClassVar[tuple[str, ...]] = ()
    accuracy: ClassVar[Accuracy] = EXACT
    changes_interface: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _check_class_attributes(cls)
        name = cls.__dict__.get("name")
        if name is None:
            return
        if not isinstance(cls.accuracy, Accuracy):
            raise PassError(f"{_where(cls)}: accuracy {cls.accuracy!r} is none of EXACT, REASSOCIATED, lossy(budget)")
        earlier = REGISTERED.get(name)
        if earlier is not None and (earlier.__module__, earlier.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PassError(f"two passes are called {name!r}: {_where(earlier)} and {_where(cls)}. Rename one of them.")
        REGISTERED[name] = cls

    @abc.abstractmethod
    def run(self, model: onnx_ir.Model) -> PassResult:
        """Change `model` in place and report what was done.

        Args:
            model: The model to change. Edit it through `passopt.ir.Editor`, which keeps names unique and records which
                nodes a new node stands for.

        Returns:
            The counts and notes of this run; `modified` must be true exactly if the printed text of the model changed.

        Raises:
            PassError: If the model or an option of the pass is wrong.
        """

    def foresee(self, model: onnx_ir.Model, pipeline: Sequence[Pass]) -> None:  # noqa: B027  # most have nothing to say
        """Raise an error if it is clear before any pass runs that this pass cannot end well.

        Most passes find that out in `run`. This is for what would be told only after minutes of other passes, such as
        options of two passes that do not go together.

        Args:
            model: The model before the first pass; it must not be changed.
            pipeline: All passes that are to run, in order.

        Raises:
            UsageError: If options of the pipeline do not go together, or not with this model.
            PassError: If the pass would fail for another reason.
        """

    def explain(self, model: onnx_ir.Model) -> Iterable[Refusal]:
        """Say where the pass would do nothing, and why, for `passopt why`.

        Only whole-graph passes need this. Rules are explained by comparing their patterns with the graph.

        Args:
            model: The model to look at; it must not be changed.

        Returns:
            One `Refusal` for every node that the pass leaves unchanged; nothing by default.
        """
        return ()


def _check_class_attributes(cls: type[Pass]) -> None:
    """Raise PassError for a class attribute whose name is nearly one of `Pass`, such as `change_interface`.

    Nothing would read it, and the pass would silently have the default. Options have annotations, and are not looked
    at; names that begin with an underscore, constants in capitals and methods are the author's own, and so is a name
    like `names` beside `name`.
    """
    known = [*Pass.__annotations__, "name"]
    annotated = inspect.get_annotations(cls)
    for attribute, value in cls.__dict__.items():
        own = attribute in annotated and "ClassVar" not in str(annotated[attribute])
        if own or attribute.startswith("_") or attribute.isupper() or callable(value) or hasattr(Pass, attribute):
            continue
        if attribute not in known and not isinstance(value, (property, classmethod, staticmethod)):
            close = difflib.get_close_matches(attribute, known, n=1, cutoff=0.75)
            if close and close[0] not in cls.__dict__:
                raise PassError(
                    f"{_where(cls)}: no pass has a class attribute {attribute!r}; did you mean {close[0]!r}?"
                )


def _where(cls: type) -> str:
    try:
        return f"{cls.__qualname__} in {inspect.getfile(cls)}"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"
