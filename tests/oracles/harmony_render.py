"""Conversations as tokens by the official chat template (transformers) and by openai-harmony, and tokens read by it.

in:  {"conversations": [{"messages": [...], "tools": [...], "effort": "low", "date": "2025-08-05",
                         "by": "template" or "harmony"}, ...],
      "texts": [[id, ...], ...]}; messages and tools in the shape of OpenAI's API, an analysis as "thinking"
out: {"rendered": [[id, ...], ...],
      "parsed": [[{"role", "name", "recipient", "channel", "content_type", "text", "end"}, ...], ...]}

A conversation whose last message is the assistant's is rendered as for training, others up to where the assistant
begins. `end` is the number of tokens up to the end of a message.
"""

import argparse
import datetime
import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import AutoTokenizer
from transformers.utils import chat_template_utils


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--inputs", type=Path, required=True)
    parser.add_argument("--outputs", type=Path, required=True)
    arguments = parser.parse_args()

    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(arguments.assets)  # before openai_harmony looks for the ranks
    import openai_harmony

    request = json.loads(arguments.inputs.read_text())
    tokenizer = AutoTokenizer.from_pretrained(arguments.assets)
    encoding = openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    rendered = [
        by_template(tokenizer, one) if one["by"] == "template" else by_harmony(openai_harmony, encoding, one)
        for one in request["conversations"]
    ]
    parsed = [parse(openai_harmony, encoding, text) for text in request["texts"]]
    arguments.outputs.write_text(json.dumps({"rendered": rendered, "parsed": parsed}))


def by_template(tokenizer: Any, conversation: dict[str, Any]) -> list[int]:
    messages = []
    for message in conversation["messages"]:
        fields = {key: value for key, value in message.items() if value not in (None, "") or message["role"] == "tool"}
        if fields.get("tool_calls"):  # transformers' documentation: templates take arguments as objects
            (call,) = fields["tool_calls"]
            arguments = json.loads(call["function"]["arguments"])
            fields["tool_calls"] = [{"function": {"name": call["function"]["name"], "arguments": arguments}}]
        messages.append(fields)
    is_prompt = messages[-1]["role"] != "assistant"
    day = datetime.datetime.fromisoformat(conversation["date"])
    with mock.patch.object(chat_template_utils, "datetime") as clock:
        clock.now.return_value = day
        return tokenizer.apply_chat_template(
            messages,
            tools=conversation["tools"] or None,
            reasoning_effort=conversation["effort"],
            add_generation_prompt=is_prompt,
            tokenize=True,
            return_dict=False,
        )


def by_harmony(harmony: Any, encoding: Any, conversation: dict[str, Any]) -> list[int]:
    Message, Role = harmony.Message, harmony.Role
    effort = harmony.ReasoningEffort(conversation["effort"].capitalize())
    system = harmony.SystemContent.new().with_reasoning_effort(effort)
    system = system.with_conversation_start_date(conversation["date"])
    written = [Message.from_role_and_content(Role.SYSTEM, system)]
    messages, developer = conversation["messages"], harmony.DeveloperContent.new()
    has_instructions = messages[0]["role"] in ("system", "developer")
    if has_instructions:
        developer = developer.with_instructions(messages[0]["content"])
    functions = [tool["function"] for tool in conversation["tools"]]
    if functions:
        described = [
            harmony.ToolDescription.new(one["name"], one.get("description") or "", parameters=one.get("parameters"))
            for one in functions
        ]
        developer = developer.with_function_tools(described)
    if has_instructions or functions:
        written.append(Message.from_role_and_content(Role.DEVELOPER, developer))
    called = ""
    for message in messages[has_instructions:]:
        if message["role"] == "user":
            written.append(Message.from_role_and_content(Role.USER, message["content"]))
        elif message["role"] == "tool":
            author = harmony.Author.new(Role.TOOL, f"functions.{called}")
            result = Message.from_author_and_content(author, message["content"])
            written.append(result.with_channel("commentary").with_recipient("assistant"))
        else:
            spoken = assistant_messages(Message, Role.ASSISTANT, message)
            called = message["tool_calls"][0]["function"]["name"] if message.get("tool_calls") else called
            written += spoken
    whole = harmony.Conversation.from_messages(written)
    if messages[-1]["role"] == "assistant":
        # by itself it drops the analysis before a first final, the one to be learned
        keeping = harmony.RenderConversationConfig(auto_drop_analysis=False)
        return encoding.render_conversation_for_training(whole, config=keeping)
    return encoding.render_conversation_for_completion(whole, Role.ASSISTANT)


def assistant_messages(Message: Any, role: Any, message: dict[str, Any]) -> list[Any]:
    spoken = []
    if message.get("thinking"):
        spoken.append(Message.from_role_and_content(role, message["thinking"]).with_channel("analysis"))
    calls = message.get("tool_calls") or []
    if message.get("content"):
        channel = message.get("channel", "final")
        spoken.append(Message.from_role_and_content(role, message["content"]).with_channel(channel))
    for call in calls:
        function = call["function"]
        written = Message.from_role_and_content(role, function["arguments"]).with_channel("commentary")
        written = written.with_recipient(f"functions.{function['name']}")
        spoken.append(written.with_content_type(call.get("content_type", "json")))
    return spoken


def parse(harmony: Any, encoding: Any, token_ids: list[int]) -> list[dict[str, Any]]:
    """The messages of a text that begins with a message's start, or, as an answer does, behind `<|start|>assistant`."""
    begins = token_ids[0] == encoding.encode("<|start|>", allowed_special="all")[0]
    reader = harmony.StreamableParser(encoding, role=None if begins else harmony.Role.ASSISTANT)
    found: list[dict[str, Any]] = []
    for end, token_id in enumerate(token_ids, start=1):
        reader.process(token_id)
        if len(reader.messages) > len(found):
            message = reader.messages[-1]
            found.append(
                {
                    "role": message.author.role.value,
                    "name": message.author.name,
                    "recipient": message.recipient,
                    "channel": message.channel,
                    "content_type": message.content_type,
                    "text": "".join(part.text for part in message.content),
                    "end": end,
                }
            )
    return found


if __name__ == "__main__":
    main()
