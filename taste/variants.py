"""What each variant of the model is made of."""

from collections.abc import Collection, Sequence

from taste.lora import is_adapter

PARTS = {  # what each variant has beside the pretrained language model
    "text_only": (),
    "simple": ("aggregator",),
    "taste_novq": ("aggregator", "audio_branch", "fusion"),
    "taste": ("aggregator", "audio_branch", "fusion", "quantizer"),
}
VARIANTS = tuple(PARTS)
PRETRAINED_PART = "llm"  # the submodule that the model folder holds; all others are a variant's own


def check_parts(variant: str, given: Collection[str]) -> None:
    """Refuse a variant with parts that are not its own, or without some that are.

    Args:
        variant: its name.
        given: names of the parts that there are.

    Raises:
        ValueError: the variant is unknown, or its parts are not those given.
    """
    if variant not in PARTS:
        raise ValueError(f"VARIANT is {variant!r}; expected one of {', '.join(VARIANTS)}")
    lacking, surplus = sorted(set(PARTS[variant]) - set(given)), sorted(set(given) - set(PARTS[variant]))
    problems = [f"needs: {', '.join(lacking)}"] if lacking else []
    problems += [f"takes no: {', '.join(surplus)}"] if surplus else []
    if problems:
        raise ValueError(f"variant {variant!r} {'; '.join(problems)}")


def idle_parts(variant: str, use_speaker: bool) -> tuple[str, ...]:
    """The parts of the language model that have no work in a variant.

    Args:
        variant: its name.
        use_speaker: whether the sequence has the speaker's position.

    Returns:
        names of submodules.
    """
    idle = ["llm.text_embedding"]
    if variant == "simple":
        idle += ["llm.text_encoder", "llm.text_encoder_affine_layer"]
    if not use_speaker:
        idle.append("llm.spk_embed_affine_layer")
    return tuple(idle)


def part_of(name: str) -> str:
    """The part that a weight belongs to.

    Args:
        name: of a weight of the model.

    Returns:
        the name of the submodule: `PRETRAINED_PART`, or one of the variant's own.
    """
    return name.partition(".")[0]


def is_pretrained(name: str) -> bool:
    """Whether the model folder holds a weight.

    Args:
        name: of a weight of the model.

    Returns:
        True where it does; False for a variant's own parts, and for adapters.
    """
    return part_of(name) == PRETRAINED_PART and not is_adapter(name)


def lies_in(name: str, parts: Sequence[str]) -> bool:
    """Whether a weight belongs to one of some submodules.

    Args:
        name: of the weight.
        parts: names of submodules.

    Returns:
        True where it does.
    """
    return name.startswith(tuple(f"{part}." for part in parts))
