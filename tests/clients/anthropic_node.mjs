// anthropic for Node, by `/v1/messages`.

import assert from "node:assert/strict";
import test from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import { ANSWER, CAPITAL, LONG, MODEL, PARIS, URL, USAGE, WEATHER, WEATHER_SCHEMA } from "./job.mjs";

const client = new Anthropic({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const greedy = { model: MODEL, temperature: 0, max_tokens: 60 };
const user = (content) => [{ role: "user", content }];
const tools = [{ name: "get_weather", input_schema: WEATHER_SCHEMA }];

test("a message is answered with its usage", async () => {
  const message = await client.messages.create({ ...greedy, messages: user(CAPITAL) });

  assert.deepEqual([message.content[0].text, message.stop_reason], [ANSWER, "end_turn"]);
  assert.deepEqual([message.usage.input_tokens, message.usage.output_tokens], USAGE);
});

test("a stream is the same answer in pieces", async () => {
  const pieces = [];
  const stream = client.messages
    .stream({ ...greedy, messages: user(CAPITAL) })
    .on("text", (piece) => pieces.push(piece));

  assert.equal(await stream.finalText(), ANSWER);
  assert.equal(pieces.join(""), ANSWER);
  assert.ok(pieces.length > 2);
});

test("a tool is used, streamed or not", async () => {
  const params = { ...greedy, messages: user(WEATHER), tools, tool_choice: { type: "any" } };
  const whole = await client.messages.create(params);
  const streamed = await client.messages.stream(params).finalMessage();

  for (const message of [whole, streamed]) {
    const [use] = message.content.filter((block) => block.type === "tool_use");
    assert.deepEqual([use.name, use.input], ["get_weather", PARIS]);
    assert.equal(message.stop_reason, "tool_use");
  }
});

test("a call is aborted, and so is a stream", async () => {
  const params = { ...greedy, messages: user(LONG), max_tokens: 4000 };
  await assert.rejects(
    client.messages.create(params, { signal: AbortSignal.timeout(500) }),
    Anthropic.APIUserAbortError,
  );
  const stream = client.messages.stream(params).on("text", () => stream.abort());
  await assert.rejects(stream.finalMessage(), Anthropic.APIUserAbortError);
});

test("each error has its class", async () => {
  const messages = user("Hi");
  await assert.rejects(
    client.messages.create({ ...greedy, messages, model: "another" }),
    Anthropic.NotFoundError,
  );
  await assert.rejects(
    client.messages.create({ ...greedy, messages, temperature: 9 }),
    Anthropic.BadRequestError,
  );
});
