"""Why a search can fail."""


class SearchError(RuntimeError):
    """The search cannot give a proposal; one line for status.json. Training goes on without it."""


class AgreedError(SearchError):
    """The ranks of a team left their common work at one and the same place, because it failed on some of
    them: the cause is the failure of this rank. Without a message on those that did not fail themselves."""


class BrokenTeamError(RuntimeError):
    """Work failed on this rank in the midst of what its team does in step: the others wait for it, and only
    its end tells them. Nothing catches it but the end of the process."""
