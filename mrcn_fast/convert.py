"""Conversion of weights: plain PyTorch forms of the blocks into ours and back, and networks by name.

Published code builds restitution and compensation from `torch.nn.InstanceNorm2d` and squeeze-and-excitation
gates of `torch.nn.Linear` or 1x1 `torch.nn.Conv2d`. `MRCNBlock` and `SNRBlock` keep the same numbers stacked
in a few tensors. The functions here move them, and compute nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from mrcn_fast.block import MODALITIES, ROLES, MRCNBlock, SNRBlock

log = logging.getLogger(__name__)

# What DataParallel and torch.compile put before the names of the network that they wrap.
_WRAPPERS: Final = ("module.", "_orig_mod.")
# BatchNorm's counts of batches, which files from before torch 0.4.1 lack and a fixed momentum doesn't read.
_COUNTER: Final = "num_batches_tracked"
_LAYERS: Final = ("fc1", "fc2")
_Block = TypeVar("_Block", MRCNBlock, SNRBlock)

# The parts of a block: their names in a mapping, and for each the parameters and the slice that hold it.
_GATES: Final = [f"{modality}.{role}" for role in ROLES for modality in MODALITIES]
_MRCN_PARTS: Final = {f"{modality}.norm": ("norm", index) for index, modality in enumerate(MODALITIES)} | {
    f"{gate}.{layer}": (f"gate.{layer}", index) for index, gate in enumerate(_GATES) for layer in _LAYERS
}
_SNR_PARTS: Final = {"norm": ("norm", 0)} | {layer: (f"gate.{layer}", 0) for layer in _LAYERS}


def mrcn_names(
    norms: Sequence[str] = ("norm_v", "norm_n"),
    gates: Sequence[str] = ("restitution_v", "restitution_n", "compensation_v", "compensation_n"),
    layers: Sequence[str] = ("fc.0", "fc.2"),
) -> dict[str, str]:
    """Make the names of a plain restitution and compensation block: part of `MRCNBlock` -> plain module.

    The result is a dictionary with ten entries, which may be changed where a gate has other layers than the
    others: "visible.norm", "infrared.norm", and "visible.restitution.fc1" and so on for both modalities, both
    roles and both layers. A gate belongs to the modality whose residual it sees: "visible.compensation" is
    A_v2, which weighs M_v in the infrared compensated features.

    Args:
        norms: the `InstanceNorm2d` of visible and infrared
        gates: the gates A_v1, A_n1, A_v2, A_n2
        layers: the two layers within each gate

    Example:
        >>> mrcn_names(gates=("mrm_v", "mrm_n", "mcm_v", "mcm_n"))["infrared.compensation.fc2"]
        'mcm_n.fc.2'
    """
    _check_count("norms", norms, 2)
    _check_count("gates", gates, 4)
    _check_count("layers", layers, 2)
    modules = [*norms, *(f"{gate}.{layer}" for gate in gates for layer in layers)]
    return dict(zip(_MRCN_PARTS, modules, strict=True))


def snr_names(
    norm: str = "IN", gate: str = "style_reweight_layer", layers: Sequence[str] = _LAYERS
) -> dict[str, str]:
    """Make the names of a plain SNR block, as `mrcn_names` does: "norm", "fc1" and "fc2".

    Example:
        >>> snr_names(gate="se", layers=("fc.0", "fc.2"))
        {'norm': 'IN', 'fc1': 'se.fc.0', 'fc2': 'se.fc.2'}
    """
    _check_count("layers", layers, 2)
    return dict(zip(_SNR_PARTS, (norm, *(f"{gate}.{layer}" for layer in layers)), strict=True))


def _check_count(name: str, given: Sequence[str], expected: int) -> None:
    if isinstance(given, str) or len(given) != expected:
        raise ValueError(f"{name}: got {given!r}, expected {expected} names")


def mrcn_from_plain(
    state: Mapping[str, Tensor], names: Mapping[str, str] | None = None, *, prefix: str = "", **options: Any
) -> MRCNBlock:
    """Make an `MRCNBlock` with the weights of a plain one, whose outputs it then equals.

    Args:
        state: the state_dict of the plain block or of a network around it
        names: the plain module of each part, see `mrcn_names`, whose defaults are taken for None
        prefix: of the plain block's names within `state`, such as "mrcn."; only names below it are read
        options: of `MRCNBlock`, such as `eps` and `restitute_to`; channels and reduction are those of
            `state`, and the dtype too unless it is given here

    Returns:
        The block, on the CPU unless `device` is given. Linear layers and 1x1 convolutions are taken alike. If
        no gate has a bias (``bias=False``), the biases are 0; if no normalization has weights
        (``affine=False``), γ is 1 and β is 0. Both are logged.

    Raises:
        ValueError: for tensors that are missing, unexpected or of the wrong shape, all of them by name, and
            for `names` with other parts

    Example:
        >>> plain = nn.ModuleDict({"norm_v": nn.InstanceNorm2d(32), "norm_n": nn.InstanceNorm2d(32)})
        >>> for gate in ("restitution_v", "restitution_n", "compensation_v", "compensation_n"):
        ...     layers = nn.Linear(32, 2), nn.ReLU(), nn.Linear(2, 32), nn.Sigmoid()
        ...     plain[gate] = nn.ModuleDict({"fc": nn.Sequential(*layers)})
        >>> mrcn_from_plain(plain.state_dict()).channels
        32
    """
    plain = _Plain(state, _MRCN_PARTS, mrcn_names() if names is None else names, prefix)
    return plain.copied_to(MRCNBlock(**plain.options(options)))


def snr_from_plain(
    state: Mapping[str, Tensor], names: Mapping[str, str] | None = None, *, prefix: str = "", **options: Any
) -> SNRBlock:
    """Make an `SNRBlock` with the weights of a plain one; arguments and errors as in `mrcn_from_plain`.

    Example:
        >>> gate = nn.ModuleDict({"fc1": nn.Conv2d(32, 2, 1), "fc2": nn.Conv2d(2, 32, 1)})
        >>> plain = nn.ModuleDict({"IN": nn.InstanceNorm2d(32, affine=True), "style_reweight_layer": gate})
        >>> snr_from_plain(plain.state_dict()).reduction
        16
    """
    plain = _Plain(state, _SNR_PARTS, snr_names() if names is None else names, prefix)
    return plain.copied_to(SNRBlock(**plain.options(options)))


def to_plain(
    block: MRCNBlock | SNRBlock,
    like: Mapping[str, Tensor],
    names: Mapping[str, str] | None = None,
    *,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Give a plain block's state_dict the weights of ours: the inverse of `mrcn_from_plain`.

    Args:
        block: the block; its gate must have the SE gate's parameters
        like: the state_dict of the plain block or of a network around it, whose names and shapes are kept
        names, prefix: as in `mrcn_from_plain` and `snr_from_plain`

    Returns:
        `like` with the block's values, for ``load_state_dict``. Names outside `prefix` stay as they are.

    Raises:
        ValueError: as `mrcn_from_plain`, and where `like` has no place for values that matter: for γ other
            than 1, and for β or gate biases other than 0

    Example:
        >>> layers = nn.ModuleDict({"fc1": nn.Linear(32, 2), "fc2": nn.Linear(2, 32)})
        >>> plain = nn.ModuleDict({"IN": nn.InstanceNorm2d(32, affine=True), "style_reweight_layer": layers})
        >>> plain.load_state_dict(to_plain(SNRBlock(32), plain.state_dict()))
        <All keys matched successfully>
    """
    snr = isinstance(block, SNRBlock)
    if names is None:
        names = snr_names() if snr else mrcn_names()
    plain = _Plain(like, _SNR_PARTS if snr else _MRCN_PARTS, names, prefix)
    return plain.filled(block)


class _Slot(NamedTuple):
    """A slice of a block's stacked parameter."""

    parameter: str
    place: int

    def of(self, parameters: Mapping[str, Tensor]) -> Tensor:
        return parameters[self.parameter][self.place]


class _Plain:
    """The state_dict of a plain block, checked, with the slot of our block that each tensor belongs to."""

    def __init__(
        self,
        state: Mapping[str, Tensor],
        parts: Mapping[str, tuple[str, int]],
        names: Mapping[str, str],
        prefix: str,
    ) -> None:
        _check_parts(parts, names)
        self.state, self.sources = state, _unwrapped(state)
        self.slots = {
            f"{prefix}{names[part]}.{kind}": _Slot(f"{parameter}_{kind}", index)
            for part, (parameter, index) in parts.items()
            for kind in ("weight", "bias")
        }
        own = [name for name in self.sources if name.startswith(prefix)]
        self.tensors = {name: state[self.sources[name]] for name in self.slots if name in own}
        self.absent = self._absent()
        first = self._check_names([name for name in own if name not in self.slots])
        self.dtype, (self.width, self.channels) = first.dtype, _without_pixels(first)
        self._check_shapes()

    def options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of our block."""
        return {"channels": self.channels, "reduction": self._reduction(), "dtype": self.dtype, **given}

    def copied_to(self, block: _Block) -> _Block:
        """Copy the tensors into our block, and return it."""
        parameters = self._parameters(block)
        with torch.no_grad():
            for name, slot in self.slots.items():
                if name in self.tensors:
                    slot.of(parameters).copy_(self.tensors[name].reshape(slot.of(parameters).shape))
                else:
                    slot.of(parameters).fill_(_neutral(slot))
        if self.absent:
            log.info("the plain block has no %s", " and no ".join(sorted(self.absent)))
        return block

    def filled(self, block: MRCNBlock | SNRBlock) -> dict[str, Tensor]:
        """Return the state_dict with the values of our block."""
        parameters = self._parameters(block)
        lost = [
            name
            for name, slot in self.slots.items()
            if name not in self.tensors and bool((slot.of(parameters) != _neutral(slot)).any())
        ]
        if lost:
            raise ValueError(
                f"the plain block has no place for {_listed(lost)}, whose values in the block matter: build "
                "it with affine=True and bias=True"
            )
        state = dict(self.state)
        for name, tensor in self.tensors.items():
            value = self.slots[name].of(parameters).detach()
            state[self.sources[name]] = value.reshape(tensor.shape).to(tensor.dtype, copy=True)
        return state

    def _parameters(self, block: MRCNBlock | SNRBlock) -> dict[str, Tensor]:
        parameters: dict[str, Tensor] = dict(block.named_parameters())
        fitting = self._shapes()
        found = {name: tuple(tensor.shape[1:]) for name, tensor in parameters.items()}
        if found != fitting:
            raise ValueError(
                f"got a block with gate={block.gate_kind!r} and the parameters {found}, expected {fitting}, "
                "as in the plain block"
            )
        return parameters

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of a slice of each of our parameters."""
        width, channels = self.width, self.channels
        return {
            "norm_weight": (channels,),
            "norm_bias": (channels,),
            "gate.fc1_weight": (width, channels),
            "gate.fc1_bias": (width,),
            "gate.fc2_weight": (channels, width),
            "gate.fc2_bias": (channels,),
        }

    def _absent(self) -> dict[str, list[str]]:
        """The groups of tensors that a plain block may lack as a whole, and does lack."""
        groups = {
            "weights of the normalizations (γ is 1, β is 0)": [
                n for n, s in self.slots.items() if "norm_" in s.parameter
            ],
            "biases of the gates (they are 0)": [
                n for n, s in self.slots.items() if s.parameter.endswith(("1_bias", "2_bias"))
            ],
        }
        return {title: names for title, names in groups.items() if not self.tensors.keys() & set(names)}

    def _check_names(self, unexpected: Sequence[str]) -> Tensor:
        """Check the names and return the first layer of a gate, whose shape says the sizes.

        Raises ValueError with all names that are missing or unexpected.
        """
        allowed = {name for names in self.absent.values() for name in names}
        missing = [name for name in self.slots if name not in self.tensors and name not in allowed]
        self._refuse({"missing": missing, "unexpected": unexpected})
        name = next(name for name, slot in self.slots.items() if slot.parameter == "gate.fc1_weight")
        first = self.tensors[name]
        if len(_without_pixels(first)) != 2:
            found = f"{name}: got {tuple(first.shape)}, expected (hidden width, channels)"
            self._refuse({"of the wrong shape": [found]})
        return first

    def _check_shapes(self) -> None:
        """Raise ValueError with all tensors of the wrong shape."""
        shapes = {name: self._shapes()[slot.parameter] for name, slot in self.slots.items()}
        wrong = [
            f"{name}: got {tuple(tensor.shape)}, expected {shapes[name]}"
            for name, tensor in self.tensors.items()
            if _without_pixels(tensor) != shapes[name]
        ]
        self._refuse({"of the wrong shape": wrong})

    @staticmethod
    def _refuse(problems: Mapping[str, Sequence[str]]) -> None:
        if any(problems.values()):
            raise ValueError(
                "the state_dict isn't that of a plain block under the names given: "
                + "; ".join(f"{title}: {_listed(names, 24)}" for title, names in problems.items() if names)
                + ". Give the names of its modules (names) and of the block within the network (prefix)"
            )

    def _reduction(self) -> int:
        reduction = self.channels // self.width if self.width <= self.channels else 0
        if reduction == 0 or self.channels // reduction != self.width:
            raise ValueError(
                f"got gates of hidden width {self.width} for {self.channels} channels, expected "
                "channels // reduction for some reduction"
            )
        return reduction


def _neutral(slot: _Slot) -> float:
    """The value of a parameter that a plain block doesn't have."""
    return 1.0 if slot.parameter == "norm_weight" else 0.0


def _without_pixels(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a weight, of a 1x1 convolution as of a linear layer."""
    shape = tuple(tensor.shape)
    return shape[:2] if shape[2:] == (1, 1) else shape


def _check_parts(parts: Iterable[str], names: Mapping[str, str]) -> None:
    expected = list(parts)
    if set(names) != set(expected):
        raise ValueError(f"names: got the parts {_listed(names, 24)}, expected {', '.join(expected)}")
    modules = list(names.values())
    if twice := sorted({module for module in modules if modules.count(module) > 1}):
        raise ValueError(f"names: got {_listed(twice)} for several parts, expected a module for each")


class Loaded(NamedTuple):
    """What `load_by_name` did; names of the network in `loaded` and `missing`, of the file in `unused`."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


# AGW and its descendants keep a whole ResNet in each of three modules, of which they run a part.
AGW_NAMES: Final[Mapping[str, str]] = {
    "visible_module.visible.": "trunk.visible.",
    "thermal_module.thermal.": "trunk.infrared.",
    "base_resnet.base.": "trunk.",
    "bottleneck.": "heads.0.neck.",
    "classifier.": "heads.0.classifier.",
}


def load_by_name(
    network: nn.Module,
    state: Mapping[str, Tensor],
    renamed: Mapping[str, str] = AGW_NAMES,
    *,
    optional: str | Collection[str] = (),
) -> Loaded:
    """Load a state_dict into a network by the names of its tensors; what doesn't load is logged by name.

    The prefixes that `DataParallel` ("module.") and `torch.compile` ("_orig_mod.") put before every name are
    removed.

    Args:
        network: the network, such as `mrcn_fast.reid.ReIDModel` or one of your own
        state: the state_dict; of AGW's files, the entry "net"
        renamed: what names in `state` begin with -> what they begin with in `network`; the longest that fits
            counts. `AGW_NAMES` is for a two-stream ResNet of AGW's layout and a `ReIDModel`.
        optional: what names of the network begin with that may be missing or of another shape, such as
            "heads." for the classifier of other identities and "plugs." for blocks that `state` doesn't have

    Returns:
        The names that were loaded, that are missing, and that are not used.

    Raises:
        ValueError: where anything that isn't `optional` is missing or of the wrong shape, with all names;
            nothing is loaded then

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5))
        >>> state = {"module.trunk.weight": torch.ones(2, 3), "module.trunk.bias": torch.ones(2)}
        >>> load_by_name(network, state, {"trunk.": "0."}, optional=("1.",)).missing
        ('1.weight', '1.bias')
    """
    sources = _unwrapped(state)
    given = {_renamed(name, renamed): source for name, source in sources.items()}
    own = network.state_dict()
    tensors = {name: state[given[name]] for name in own if name in given}
    fitting = {name: tensor for name, tensor in tensors.items() if tensor.shape == own[name].shape}
    missing = [name for name in own if name not in fitting]
    # Without the counts of batches that an old file doesn't have: nothing is lost with them.
    described = {
        name: _described(name, own[name], tensors.get(name))
        for name in missing
        if name in tensors or not name.endswith(_COUNTER)
    }
    _check_required(described, optional, sources)
    used = {given[name] for name in fitting}
    unused = [name for name, source in sources.items() if source not in used]
    network.load_state_dict(fitting, strict=False)
    log.info("loaded %d of the network's %d tensors by name", len(fitting), len(own))
    if described:
        log.warning("not loaded, so that the network's values stay: %s", _listed(described.values(), 24))
    if unused:
        log.warning("in the state_dict and not used: %s", _listed(unused, 24))
    return Loaded(tuple(fitting), tuple(missing), tuple(unused))


def _check_required(
    described: Mapping[str, str], optional: str | Collection[str], sources: Collection[str]
) -> None:
    """Raise ValueError for tensors that don't load, which are `described`, and are not `optional`."""
    may_miss = (optional,) if isinstance(optional, str) else tuple(optional)
    if required := [text for name, text in described.items() if not name.startswith(may_miss)]:
        raise ValueError(
            f"the state_dict doesn't fit: missing or of the wrong shape: {_listed(required, 24)}. "
            f"It has {_listed(sources)}. Give the beginnings of its names (renamed), or what may be missing "
            "(optional)"
        )


def _renamed(name: str, renamed: Mapping[str, str]) -> str:
    for beginning in sorted(renamed, key=len, reverse=True):
        if name.startswith(beginning):
            return renamed[beginning] + name.removeprefix(beginning)
    return name


def _described(name: str, expected: Tensor, found: Tensor | None) -> str:
    if found is None:
        return name
    return f"{name}: got {tuple(found.shape)}, expected {tuple(expected.shape)}"


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the names without the prefixes of wrappers, which all names have, to the names in the state_dict.

    Raises ValueError where something in the state_dict isn't a tensor.
    """
    values: Mapping[str, object] = state
    if strange := [name for name, value in values.items() if not isinstance(value, Tensor)]:
        raise ValueError(
            f"got a state_dict whose {strange[0]!r} is {type(state[strange[0]]).__name__}, expected tensors "
            "alone: give the entry that holds the network's"
        )
    names = {name: name for name in state}
    while wrapper := next((w for w in _WRAPPERS if names and all(n.startswith(w) for n in names)), None):
        names = {name.removeprefix(wrapper): source for name, source in names.items()}
    return names


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
