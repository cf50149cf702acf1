"""The only module that touches Flower's private names."""

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    *("CLIENT_CRASHED", "CLIENT_RAISED", "RUN_ID", "Run", "empty_run", "identify_process"),
    *("set_answered_id", "set_message_id"),
]

CLIENT_RAISED: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
CLIENT_CRASHED: int = ErrorCode.CLIENT_APP_CRASHED
RUN_ID = 1
SERVER_NODE = 1


def identify_process() -> None:
    """Let this process make messages: `Message(...)` reads its sender from globals that Flower's own engine sets."""
    TaskIdentity.task_id = TaskIdentity.run_id = RUN_ID
    TaskIdentity.node_id = SERVER_NODE


def set_message_id(message: Message, message_id: str) -> None:
    """Name a message; Flower's link does this when it accepts one, and a reply refers to the name."""
    message.metadata.__dict__["_message_id"] = message_id


def set_answered_id(reply: Message, message_id: str) -> None:
    """Have a reply refer to another message than the one that it was made for."""
    reply.metadata.__dict__["_reply_to_message_id"] = message_id


def empty_run() -> Run:
    """The run a grid reports before `set_run`: a number and no app bundle."""
    return Run.create_empty(RUN_ID)
