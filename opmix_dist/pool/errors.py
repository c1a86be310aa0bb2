"""Why a search can fail."""


class SearchError(RuntimeError):
    """The search cannot give a proposal; one line for status.json. Training goes on without it."""
