"""A chat that switches adapters in mid-conversation: `/use NAME` answers with another adapter from the next line on.

flora serve &
python examples/chat_switch.py [http://127.0.0.1:8000]

/models        what the server has
/use NAME      switch; NAME:ALIAS and NAME@vN work too
/new           forget the conversation
/quit          or end of input
"""

import sys

import openai
from openai import OpenAI

MAX_TOKENS = 256


def main(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = next(iter(client.models.list())).id  # the base comes first
    messages: list[dict[str, str]] = []
    print(f"talking to {model}; /models, /use NAME, /new, /quit")
    for line in map(str.strip, sys.stdin):
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/models":
            print("\n".join(entry.id for entry in client.models.list()))
        elif command == "/new":
            messages = []
        elif command == "/use":
            model = rest.strip()
            print(f"talking to {model}")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": answer(client, model, messages)})
            except openai.APIStatusError as error:
                messages.pop()
                print(f"{error.status_code}: {error.body['message'] if isinstance(error.body, dict) else error}")


def answer(client: OpenAI, model: str, messages: list) -> str:
    """The model's reply, printed as it comes."""
    said = ""
    stream = client.chat.completions.create(
        model=model, messages=messages, max_tokens=MAX_TOKENS, temperature=0.7, stream=True
    )
    for chunk in stream:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            said += piece
            print(piece, end="", flush=True)
    print()
    return said


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000")
