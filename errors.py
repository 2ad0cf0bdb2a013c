"""One exception for everything the user can put right."""


class UserError(ValueError):
    """Bad input. The message names the file, tensor or field, what was found, what is accepted and how to fix it.

    The command line prints it alone and exits with 2; the HTTP server answers 400 with it.
    """
