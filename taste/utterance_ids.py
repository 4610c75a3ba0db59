"""One utterance id, however a file spells it.

Files in circulation are keyed by the id (`103-1240-0000`), by the recording's path
(`LibriSpeech/train-clean-100/103/1240/103-1240-0000.flac`), or by that relative path with dashes
(`103-1240-103-1240-0000`).
"""

from collections.abc import Collection, Iterable, Mapping

AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".sph", ".aiff", ".aif", ".au")
SHORTEST_FOLDER_PARTS = 2  # LibriSpeech's speaker and chapter; one repeated part alone may well be a real id


def normalise_key(key: str, known_ids: Collection[str] = ()) -> str:
    """The utterance id that a key stands for.

    A path gives its last part without the sound file's suffix. In a dashed path the folders are dropped: where an id of
    `known_ids` ends the key it is that one, else where the id repeats its folders (`103-1240-103-1240-0000`). Anything
    else is an id already. Applying it twice changes nothing.

    Args:
        key: the key as a file has it.
        known_ids: ids that certainly exist (of the manifest, say); needed only for dashed paths of other corpora.

    Returns:
        the utterance id.
    """
    name = key.replace("\\", "/").rstrip("/").rpartition("/")[2]
    while name.lower().endswith(AUDIO_SUFFIXES) and name.rpartition(".")[0]:
        name = name.rpartition(".")[0]
    if name in known_ids:
        return name
    parts = name.split("-")
    if known_ids:
        for start in range(1, len(parts)):
            ending = "-".join(parts[start:])
            if ending in known_ids:
                return ending
    shortest, longest = SHORTEST_FOLDER_PARTS + 1, (len(parts) + 1) // 2
    for start in range(len(parts) - shortest, len(parts) - longest - 1, -1):
        folders = parts[start:-1]
        if parts[start - len(folders) : start] == folders:
            return "-".join(parts[start:])
    return name


def describe_scheme(key: str) -> str:
    """The scheme of a key, in words.

    Args:
        key: the key as a file has it.

    Returns:
        `path`, `dashed path` or `id`.
    """
    if "/" in key or "\\" in key:
        return "path"
    return "id" if normalise_key(key) == key else "dashed path"


def common_ids(named: Mapping[str, Iterable[str]]) -> list[str]:
    """The utterances that every one of several sources has, in the order of the first.

    Args:
        named: the keys of each source, under a name a person knows it by; any key scheme.

    Returns:
        utterance ids, at least one.

    Raises:
        ValueError: no utterance is in all of them; the message shows each source's count, key scheme and first key.
    """
    keys = {name: list(source) for name, source in named.items()}
    ids = {name: [normalise_key(key) for key in source] for name, source in keys.items()}
    first, *others = ids.values()
    in_others = [set(source) for source in others]
    common = [utt_id for utt_id in dict.fromkeys(first) if all(utt_id in source for source in in_others)]
    if common:
        return common
    seen = []
    for name, source in keys.items():
        scheme = f", keyed by {describe_scheme(source[0])}, such as {source[0]!r}" if source else ""
        seen.append(f"  {name}: {len(source)} keys{scheme}")
    raise ValueError(
        "no utterance is in all of these files:\n"
        + "\n".join(seen)
        + "\nThey must come from one manifest; make the odd one again from the manifest of the others."
    )
