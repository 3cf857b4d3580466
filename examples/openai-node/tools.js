// OpenAI's SDK for Node, unchanged: the model calls a function of this program.
//
//     cd examples/openai-node && npm ci && node tools.js
//
// PENSTOCK_URL names another server than http://127.0.0.1:8000. With the small model in the box the choice of a city is
// arbitrary, but the form of the call is right: the server holds every token to the schema.

import assert from "node:assert/strict";
import OpenAI from "openai";

const url = process.env.PENSTOCK_URL ?? "http://127.0.0.1:8000";
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
const model = (await client.models.list()).data[0].id;

const weather = ({ city }) => `Rain in ${city}.`;

// The helper streams the reply, calls the function with the arguments that it was given, and tells the model the result.
const runner = client.chat.completions.runTools({
  model,
  messages: [{ role: "user", content: "How is the weather in Rome?" }],
  tools: [
    {
      type: "function",
      function: {
        name: "weather",
        description: "The weather in a city.",
        parameters: {
          type: "object",
          properties: { city: { enum: ["Ulm", "Rome"] } },
          required: ["city"],
          additionalProperties: false,
        },
        parse: JSON.parse,
        function: weather,
      },
    },
  ],
  tool_choice: { type: "function", function: { name: "weather" } }, // with "auto" a model decides by itself
  stream: true,
});
let result;
runner.on("functionToolCallResult", (told) => (result = told));
const call = await runner.finalFunctionToolCall();
console.log(call.name, call.arguments, "→", result);
assert.equal(result, weather(JSON.parse(call.arguments)));
