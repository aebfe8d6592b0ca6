// Vercel AI SDK by the providers that its users choose between.

import assert from "node:assert/strict";
import test from "node:test";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";
import { ANSWER, API, CAPITAL, EARLIER, LONG, MODEL, PARIS, REPORT, USAGE, WEATHER, question } from "./job.mjs";

const server = { baseURL: API, apiKey: "none" };
const compatible = createOpenAICompatible({
  ...server,
  name: "xyserve",
  supportsStructuredOutputs: true,
  includeUsage: true,
});
const openai = createOpenAI(server);
const providers = {
  "openai-compatible": (id) => compatible.chatModel(id),
  "openai chat": (id) => openai.chat(id),
  "openai responses": (id) => openai.responses(id),
};
const greedy = { temperature: 0, maxOutputTokens: 60, maxRetries: 0 };
const getWeather = tool({
  description: "The weather in a city.",
  inputSchema: z.object({
    city: z.enum(["Paris", "Rome", "Oslo"]),
    unit: z.enum(["celsius", "fahrenheit"]),
  }),
  execute: async () => REPORT,
});
const Place = z.object({ name: z.enum(["Paris", "Rome"]), country: z.enum(["France", "Italy"]) });

function earlierMessages() {
  return Object.entries(EARLIER).flatMap(([city, report]) => {
    const call = { toolCallId: city, toolName: "get_weather" };
    const input = { city, unit: "celsius" };
    const output = { type: "text", value: report };
    return [
      { role: "user", content: question(city) },
      { role: "assistant", content: [{ type: "tool-call", ...call, input }] },
      { role: "tool", content: [{ type: "tool-result", ...call, output }] },
      { role: "assistant", content: report },
    ];
  });
}

for (const [name, provider] of Object.entries(providers)) {
  const asked = { ...greedy, model: provider(MODEL) };

  test(`${name}: a text is generated and streamed with its usage`, async () => {
    const whole = await generateText({ ...asked, prompt: CAPITAL });
    const stream = streamText({ ...asked, prompt: CAPITAL });
    const pieces = [];
    for await (const piece of stream.textStream) pieces.push(piece);

    assert.deepEqual([whole.text, pieces.join("")], [ANSWER, ANSWER]);
    assert.ok(pieces.length > 2);
    for (const usage of [whole.usage, await stream.usage]) {
      assert.deepEqual([usage.inputTokens, usage.outputTokens], USAGE);
    }
  });

  test(`${name}: the model calls a tool and reads its result`, async () => {
    const result = await generateText({
      ...asked,
      messages: [...earlierMessages(), { role: "user", content: WEATHER }],
      tools: { get_weather: getWeather },
      stopWhen: isStepCount(3),
    });

    const calls = result.steps.flatMap((step) => step.toolCalls);
    assert.deepEqual(calls.map((call) => call.input), [PARIS]);
    assert.equal(result.steps.at(-1).text, REPORT);
  });

  test(`${name}: a required tool call streams`, async () => {
    const stream = streamText({
      ...asked,
      prompt: WEATHER,
      tools: { get_weather: getWeather },
      toolChoice: "required",
    });

    const [call] = await stream.toolCalls;
    assert.deepEqual([call.toolName, call.input], ["get_weather", PARIS]);
  });

  test(`${name}: an object is generated and streamed`, async () => {
    const prompt = "Paris is the capital of France.";
    const output = Output.object({ schema: Place });
    const whole = await generateText({ ...asked, prompt, output });
    const stream = streamText({ ...asked, prompt, output });
    const states = [];
    for await (const state of stream.partialOutputStream) states.push(state);

    assert.ok(Place.safeParse(whole.output).success);
    assert.deepEqual(states.at(-1), whole.output);
  });

  test(`${name}: an error carries its status`, async () => {
    const isNotFound = (error) => APICallError.isInstance(error) && error.statusCode === 404;
    await assert.rejects(
      generateText({ ...greedy, model: provider("another"), prompt: "Hi" }),
      isNotFound,
    );
  });

  test(`${name}: a call is aborted, and so is a stream`, async () => {
    const long = { ...asked, prompt: LONG, maxOutputTokens: 4000 };
    await assert.rejects(
      generateText({ ...long, abortSignal: AbortSignal.timeout(500) }),
      /abort|timeout/i,
    );
    const controller = new AbortController();
    const stream = streamText({ ...long, abortSignal: controller.signal });
    const kinds = new Set();
    for await (const part of stream.stream) {
      kinds.add(part.type);
      if (part.type === "text-delta") controller.abort();
    }
    assert.ok(kinds.has("abort"));
  });
}
