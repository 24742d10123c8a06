"""The configuration of RoCoFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft.config import PeftConfig

from turnrow.errors import UserError, near_matches
from turnrow.ops.subspace import check_subspaces
from turnrow.selection import STRATEGIES, check_form, check_strategy, read_indices
from turnrow.tuners._names import check_expression, check_names

__all__ = ["RocoftConfig"]

Mode = Literal["row", "column", "row+column", "entry"]
Bias = Literal["none", "rocoft_only", "all"]


@dataclass
class RocoftConfig(PeftConfig):
    """Train r rows or columns of each target weight, or single entries (Kowsher et al., ACL 2025, equation 2, tables 11, 12).

    To begin with: ``RocoftConfig(r=3, bias="rocoft_only")``, with a learning rate of 3e-3 or 1e-2 for AdamW. Of all that was measured on a
    small encoder and five data sets of 1,000 rows (``docs/results.md``), training the biases of the adapted layers too helped most: 1 to 2.5 points over
    the same rows alone on four of them, for a third more parameters. Choosing rows by data, other learning rates for some modules and re-selection
    added nothing to it. The exception is CoLA, where rows alone did better, and where seeds lie far apart.

    For a decoder without biases: ``RocoftConfig(r=3, mode="column")``, with a learning rate of 1e-1. On a small Llama that learnt plays and
    instructions it came within 8 % and 1 % of LoRA of rank 1 in perplexity, where three rows stayed at twice that; columns chosen by Wanda did no
    better than the first ones.

    Raises:
        UserError: a value is not allowed; names it and what is allowed.
    """

    r: int = field(default=3, metadata={"help": "How many rows or columns of each weight are trained."})
    mode: Mode = field(
        default="row",
        metadata={
            "help": "'row' trains W[S, :], one output feature a row; 'column' trains W[:, S], one input feature a column, and "
            "keeps almost nothing for the backward pass; 'row+column' trains r of each, what lies in both once; 'entry' "
            "trains the share `density` of all single entries."
        },
    )
    density: float | None = field(
        default=None,
        metadata={
            "help": "Share of the entries that mode 'entry' trains, above 0 and at most 1; r plays no part there."
        },
    )
    selection: str = field(
        default="first",
        metadata={
            "help": "How rows, columns or entries are chosen where indices does not name them. By number: 'first', 'last', "
            "'uniform' (evenly spaced), 'random'. By what the base does with data: 'wanda_max', 'wanda_min', 'wanda_mixed', "
            "'gradient', 'fisher'; for these call turnrow.select(model, batches) before training."
        },
    )
    selection_seed: int = field(
        default=0, metadata={"help": "Seed of the selection 'random', which differs from module to module."}
    )
    indices: list[int] | dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Which rows or columns. None chooses them by selection; a list serves every module; a dict maps module "
            "names (whole, or their last parts) to lists, and selection serves the modules it does not name. For 'row+column' "
            "{'row': [...], 'column': [...]} stands in the place of a list; for 'entry' a number is row * in_features + "
            "column. For a fused weight of experts a list serves every expert, a list of lists has one for each. A text is the "
            "path of a file that turnrow select wrote; what it holds takes its place. Where indices are given their number is "
            "the rank of the module. They are saved with the adapter."
        },
    )
    within: str | list[int] | dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "The rows, columns or entries that may be chosen, so that several adapters can share a layer and none touches what "
            "is another's. None allows all; a text is a slice: ':50%' the first half, '50%:' the second, '::2' every second, "
            "'1::2' the others; a list names numbers. A dict maps module names (whole, or their last parts) to such values. "
            "Where indices are given they are used as they are."
        },
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the linear modules to train, whole or their last parts, or one regular expression. "
            "None or 'all-linear' takes every linear module but the output layer."
        },
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of fused weights of experts, whole or their last parts, such as 'experts.down_proj': parameters of three "
            "dimensions that hold all experts of a layer; r rows or columns of each expert are trained. None takes all of "
            "them where target_modules is None or 'all-linear', and otherwise none, with a warning; [] takes none."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names, or one regular expression, of modules and fused weights to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Numbers of the layers to train; None trains all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that holds the layers, such as 'layers' or 'h'."}
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "Module names or regular expressions to a rank other than r, as in LoRA."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole and saved with the adapter, such as a classifier."}
    )
    bias: Bias = field(
        default="none",
        metadata={
            "help": "Which biases are trained too: 'none', those of the target modules ('rocoft_only'), or 'all'. They "
            "are stored as differences, so that the base model stays as it was."
        },
    )

    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start at zero, which is the pretrained model. False starts at small random differences, for trying out "
            "a pipeline without training."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        from peft.utils.peft_types import PeftType

        self.peft_type = PeftType("ROCOFT")
        check_names(self)
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        _check_choice("mode", self.mode, get_args(Mode))
        _check_choice("bias", self.bias, get_args(Bias))
        _check_rank("r", self.r)
        _check_density(self.mode, self.density)
        _check_ranks(self.rank_pattern)
        check_strategy(self.selection)
        if isinstance(self.selection_seed, bool) or not isinstance(self.selection_seed, int):
            raise UserError(f"selection_seed is {self.selection_seed!r}; it must be a whole number")
        check_subspaces(self.within, "within")
        if isinstance(self.indices, str):
            if self.indices in STRATEGIES:
                raise UserError(
                    f"indices is {self.indices!r}, which is a strategy: say selection={self.indices!r}. As a text it must be the "
                    "path of a file that turnrow select wrote"
                )
            self.indices = read_indices(self.indices, self.mode)
        elif self.indices is not None and not isinstance(self.indices, (list, tuple, dict)):
            raise UserError(
                f"indices is {self.indices!r}; it must be None, a list of numbers, a dict from module names to lists, or the "
                "path of a file that turnrow select wrote"
            )
        elif self.indices is not None:
            check_form(self.indices, "indices")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UserError("layers_to_transform needs target_modules as a list of names, not a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern is set but layers_to_transform is not: give the layer numbers too")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(
            f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}{near_matches(str(value), allowed)}"
        )


def _check_rank(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name} is {value!r}; it must be a whole number of rows or columns, 1 or more")


def _check_ranks(ranks: object) -> None:
    if not isinstance(ranks, dict):
        raise UserError(
            f"rank_pattern is {ranks!r}; it must be a dict from module names to ranks, such as {{'q_proj': 8}}"
        )
    for pattern, rank in ranks.items():
        if not isinstance(pattern, str):
            raise UserError(f"rank_pattern names {pattern!r}; names of modules are texts, such as {str(pattern)!r}")
        check_expression(pattern, "rank_pattern names")
        _check_rank(f"rank_pattern[{pattern!r}]", rank)


def _check_density(mode: str, density: object) -> None:
    if mode != "entry":
        if density is not None:
            raise UserError(f"density is {density!r}, but mode {mode!r} trains whole {mode}s: set r, or mode='entry'")
        return
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise UserError(
            f"density is {density!r}; mode 'entry' needs the share of entries to train, above 0 and at most 1, such as 0.01"
        )
