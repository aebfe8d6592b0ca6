// openai for Node.

import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { ANSWER, API, CAPITAL, LONG, MODEL, PARIS, USAGE, WEATHER, WEATHER_SCHEMA } from "./job.mjs";

const client = new OpenAI({ baseURL: API, apiKey: "none", maxRetries: 0 });
const greedy = { model: MODEL, temperature: 0, max_tokens: 60 };
const tools = [{ type: "function", function: { name: "get_weather", parameters: WEATHER_SCHEMA } }];
const user = (content) => [{ role: "user", content }];
const Place = z.object({
  name: z.enum(["Paris", "Rome"]),
  country: z.enum(["France", "Italy"]),
  is_capital: z.boolean(),
});

test("a chat is answered with its usage", async () => {
  const answer = await client.chat.completions.create({ ...greedy, messages: user(CAPITAL) });

  assert.equal(answer.choices[0].message.content, ANSWER);
  assert.deepEqual([answer.usage.prompt_tokens, answer.usage.completion_tokens], USAGE);
});

test("a stream is the same answer in pieces", async () => {
  const pieces = [];
  const stream = client.chat.completions
    .stream({ ...greedy, messages: user(CAPITAL), stream_options: { include_usage: true } })
    .on("content", (delta) => pieces.push(delta));

  assert.equal(await stream.finalContent(), ANSWER);
  assert.equal(pieces.join(""), ANSWER);
  assert.ok(pieces.length > 2);
  assert.equal((await stream.totalUsage()).completion_tokens, USAGE[1]);
});

test("a tool is called, streamed or not", async () => {
  const params = { ...greedy, messages: user(WEATHER), tools, tool_choice: "required" };
  const whole = await client.chat.completions.create(params);
  const streamed = await client.chat.completions.stream(params).finalChatCompletion();

  for (const answer of [whole, streamed]) {
    const [call] = answer.choices[0].message.tool_calls;
    assert.equal(call.function.name, "get_weather");
    assert.deepEqual(JSON.parse(call.function.arguments), PARIS);
  }
});

test("an answer is parsed by zod", async () => {
  const answer = await client.chat.completions.parse({
    ...greedy,
    messages: user("Name Paris as a place."),
    response_format: zodResponseFormat(Place, "place"),
  });

  assert.ok(Place.safeParse(answer.choices[0].message.parsed).success);
});

test("responses are made, streamed and parsed", async () => {
  const params = { model: MODEL, temperature: 0, max_output_tokens: 60 };
  const whole = await client.responses.create({ ...params, input: CAPITAL });
  const pieces = [];
  const stream = client.responses
    .stream({ ...params, input: CAPITAL })
    .on("response.output_text.delta", (event) => pieces.push(event.delta));
  const final = await stream.finalResponse();
  const parsed = await client.responses.parse({
    ...params,
    input: "Name Paris as a place.",
    text: { format: zodTextFormat(Place, "place") },
  });

  assert.deepEqual([whole.output_text, pieces.join("")], [ANSWER, ANSWER]);
  assert.deepEqual([final.usage.input_tokens, final.usage.output_tokens], USAGE);
  assert.ok(Place.safeParse(parsed.output_parsed).success);
});

test("a call is aborted, and so is a stream", async () => {
  const params = { ...greedy, messages: user(LONG), max_tokens: 4000 };
  const signal = AbortSignal.timeout(500);
  await assert.rejects(
    client.chat.completions.create(params, { signal }),
    OpenAI.APIUserAbortError,
  );
  const stream = await client.chat.completions.create({ ...params, stream: true });
  let count = 0;
  for await (const _ of stream) {
    if (++count === 3) stream.controller.abort();
  }
  assert.ok(count < 4000);
});

test("each error has its class", async () => {
  const messages = user("Hi");
  await assert.rejects(
    client.chat.completions.create({ model: "another", messages }),
    OpenAI.NotFoundError,
  );
  await assert.rejects(
    client.chat.completions.create({ ...greedy, messages, temperature: 9 }),
    (error) => error instanceof OpenAI.BadRequestError && /temperature/.test(error.message),
  );
  await assert.rejects(client.models.retrieve("another"), OpenAI.NotFoundError);
});

test("the id of a call comes back in its headers", async () => {
  const { data, response } = await client.chat.completions
    .create(
      { ...greedy, messages: user("Hi"), max_tokens: 1 },
      { headers: { "x-request-id": "job-8" } },
    )
    .withResponse();

  assert.equal(response.headers.get("x-request-id"), "job-8");
  assert.equal(data.id, "chatcmpl-job-8");
});

test("the model is listed and found", async () => {
  const models = [];
  for await (const model of client.models.list()) models.push(model.id);

  assert.deepEqual(models, [MODEL]);
  assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
});
