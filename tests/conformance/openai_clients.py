"""Asks a server as people's programs do, each with its default parameters; prints what each of them got, as JSON.

python openai_clients.py --url http://127.0.0.1:8000 --model MODEL
"""

import argparse
import asyncio
import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # read when it is imported; the other one is on the web

import instructor
import langchain_openai
import litellm
import openai
import pydantic
from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from langchain_core.tools import tool

QUESTION = "What is 17 + 25?"


def add(a: int, b: list) -> int:
    """Adds numbers."""
    return a + b[0]


class Sum(pydantic.BaseModel):
    """A call's arguments."""

    a: int
    b: list


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True)
    arguments = parser.parse_args()
    base, model = arguments.url + "/v1", arguments.model
    options = {"base_url": base, "api_key": "none"}
    asked = {"messages": [{"role": "user", "content": QUESTION}]}
    found = {}

    for stream in (False, True):
        reply = litellm.completion(model=f"openai/{model}", api_base=base, api_key="none", stream=stream, **asked)
        parts = [chunk.choices[0].delta for chunk in reply] if stream else [reply.choices[0].message]
        found[f"litellm, stream={stream}"] = "".join(part.content or "" for part in parts)

    chat = langchain_openai.ChatOpenAI(model=model, **options)
    found["langchain"] = chat.invoke(QUESTION).content
    found["langchain, streamed"] = "".join(chunk.content for chunk in chat.stream(QUESTION))
    found["langchain, tools"] = [call["name"] for call in chat.bind_tools([tool(add)]).invoke(QUESTION).tool_calls]
    responses = langchain_openai.ChatOpenAI(model=model, use_responses_api=True, **options)
    found["langchain, responses"] = responses.invoke(QUESTION).text
    found["langchain, completions"] = langchain_openai.OpenAI(model=model, **options).invoke("Go")

    client = instructor.from_openai(openai.OpenAI(**options), mode=instructor.Mode.TOOLS)
    demanded = client.chat.completions.create(model=model, response_model=Sum, max_retries=0, **asked)
    found["instructor"] = demanded.model_dump()

    set_tracing_disabled(True)
    asynchronous = openai.AsyncOpenAI(**options)
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        agent = Agent(name="one", instructions="Be brief.", model=kind(model=model, openai_client=asynchronous))
        found[f"agents, {kind.__name__}"] = Runner.run_sync(agent, QUESTION).final_output

    async def streamed() -> str:
        kind = OpenAIResponsesModel(model=model, openai_client=asynchronous)
        agent = Agent(name="one", instructions="Be brief.", model=kind, tools=[function_tool(add)])
        run = Runner.run_streamed(agent, QUESTION)
        async for _ in run.stream_events():
            pass
        return run.final_output

    found["agents, streamed, tools"] = asyncio.run(streamed())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
