"""ldm configs: the config files of the package."""

from ldm.console.configs import listed
from ldm.errors import UserError


def main(command: str, arguments: list[str]) -> int:
    if arguments and arguments[0] not in ("-h", "--help"):
        raise UserError("it takes no arguments: it lists the config files of the package, which -c NAME reads")
    found = listed()
    width = max(len(name) for name, _ in found) + 2
    print("Config files of the package, for -c NAME; the package's files may be given in any order.\n")
    print("\n".join(f"{name:<{width}}{about}" for name, about in found))
    return 0
