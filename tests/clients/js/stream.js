// Streams a chat and a completion, whole ones beside them, and prints what came as one line of JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none needed", maxRetries: 0 });
const [{ id: model }] = (await client.models.list()).data;
const greedy = { model, temperature: 0, max_tokens: 24 };
const messages = [{ role: "user", content: "Name three colours." }];
const prompt = "The capital of France is";

const chat = { pieces: [], role: null, finish: null, usage: null };
for await (const chunk of await client.chat.completions.create({
  ...greedy,
  messages,
  stream: true,
  stream_options: { include_usage: true },
})) {
  const choice = chunk.choices[0];
  chat.role ??= choice?.delta.role;
  if (choice?.delta.content) chat.pieces.push(choice.delta.content);
  chat.finish ??= choice?.finish_reason ?? null;
  chat.usage = chunk.usage ?? chat.usage;
}

const completion = { pieces: [] };
for await (const chunk of await client.completions.create({ ...greedy, prompt, stream: true })) {
  if (chunk.choices[0]?.text) completion.pieces.push(chunk.choices[0].text);
}

const wholeChat = await client.chat.completions.create({ ...greedy, messages });
const wholeCompletion = await client.completions.create({ ...greedy, prompt });
const refusal = await client.chat.completions.create({ ...greedy, messages, model: "gpt-9" }).catch((error) => error);

console.log(
  JSON.stringify({
    model,
    chat,
    completion,
    wholeChat: wholeChat.choices[0].message.content,
    wholeCompletion: wholeCompletion.choices[0].text,
    refusal: { kind: refusal.constructor.name, status: refusal.status, code: refusal.code },
  }),
);
