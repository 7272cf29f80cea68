"""Users with less than what the tests run as may have."""

import os


def unprivileged() -> list[str]:
    """Words before a command that make root be refused what a file's mode refuses others."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]


def nobody() -> list[str]:
    """Words before a command that run it as a user who is not among the system's, and has no home.

    To what is outside of this, it is still the user that runs the tests.
    """
    return ["env", "-u", "HOME", "-u", "XDG_CACHE_HOME", "unshare", "-U", "--map-user=54321"]
