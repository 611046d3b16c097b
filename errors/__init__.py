"""What a user can mend: a command prints it as one sentence, and exits with code 2."""


class UserError(ValueError):
    """The message says what was found, what was expected and what to do."""


class DataError(UserError):
    """Episodes, pictures or actions that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used."""


class RequestError(UserError):
    """An option out of range, or an action or a frame that does not fit the world model."""
