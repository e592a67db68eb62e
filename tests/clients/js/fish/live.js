// Two utterances on one socket, word by word, and what came of them as one line of JSON.
import { decode, encode } from "@msgpack/msgpack";
import WebSocket from "ws";

// The key goes into a header, which browsers cannot send: this needs the package.
const headers = { Authorization: `Bearer ${process.argv[3]}` };
const socket = new WebSocket(process.argv[2].replace("http", "ws") + "/v1/tts/live", { headers });
socket.binaryType = "arraybuffer";

const request = { text: "", format: "wav", temperature: 0, max_new_tokens: 6 };
const send = (event) => socket.send(encode(event));
const utterances = [];

function speak() {
  utterances.push({ pieces: [], bytes: 0, head: "", finish: null, errors: [] });
  send({ event: "start", request });
  for (const word of "Hello there from another language.".split(/(?<= )/)) send({ event: "text", text: word });
  send({ event: "flush" });
  send({ event: "text", text: "Goodbye." });
  send({ event: "stop" });
}

socket.addEventListener("open", speak);
socket.addEventListener("message", ({ data }) => {
  const event = decode(new Uint8Array(data));
  const utterance = utterances.at(-1);
  if (event.event === "audio") {
    utterance.head ||= String.fromCharCode(...event.audio.subarray(0, 4));
    utterance.pieces.push(event.audio.length);
    utterance.bytes += event.audio.length;
  } else if (event.event === "error") {
    utterance.errors.push(event.error);
  } else if (event.event === "finish") {
    utterance.finish = event;
    utterances.length < 2 ? speak() : socket.close();
  }
});
socket.addEventListener("close", () => console.log(JSON.stringify(utterances)));
