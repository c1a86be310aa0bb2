"""The one exception that reaches a user as a single clear line."""


class UserError(Exception):
    """Something the user can mend: a key, a file, a domain or a rank, and what to do about it.

    ``opmix`` prints the message on one line and exits with status 2. Everything else is a defect of ours
    and keeps its traceback.
    """
