"""Log lines of every room, formatted here once: structlog as the formatter of the standard library's loggers."""

import logging
import sys


def configure_logs(level: int, *, as_json: bool = False) -> None:
    """Sends Flora's log, from `level` on, to stderr: a line for people, or one JSON object a line."""
    import structlog

    shared: list[structlog.types.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
    ]
    rendered: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(),
            # its own choice would show every frame's locals: clients' keys and prompts
            exception_formatter=structlog.dev.plain_traceback,
        )
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.processors.format_exc_info] if as_json else shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, rendered],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("flora").setLevel(level)
