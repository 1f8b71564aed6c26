"""Names of classes and their numbers."""


def label_of(wanted: str | int, names: list[str], num_classes: int) -> int:
    """A class by number or name (also its last part, or any part that only one name has)."""
    if wanted in names:
        return names.index(str(wanted))
    text = str(wanted).lower()
    if text.isdecimal() and text not in names and int(text) < num_classes:
        return int(text)
    exact = [i for i, name in enumerate(names) if text in (name.lower(), name.lower().split("/")[-1])]
    found = exact or [i for i, name in enumerate(names) if text in name.lower()]
    if len(exact) == 1 or len(found) == 1:
        return found[0]
    listed = ", ".join(names[i] for i in found) if found else ", ".join(names) or f"0 to {num_classes - 1}"
    raise ValueError(f"class {wanted!r} is {'ambiguous' if found else 'unknown'}; allowed: {listed}")
