// The page of a live server. `window.live` holds what tests read.
"use strict";

const at = (id) => document.getElementById(id);
const query = location.search; // carries the token
const socketAddress = new URL(`v1/realtime/video${query}`, location.href.replace(/^http/, "ws"));
const MOST_BUFFERED_S = 0.6;
const MOST_SENT_S = 20;
const live = (window.live = { state: "idle", errors: [], chunks: 0, transport: null });
let speaking = 0; // counts files and interruptions; a file ends where the next one begins
let socket, peer, media, source, queue, audio, microphone, pinging;

function show(text) { at("status").textContent = text; }
function send(values) { if (socket && socket.readyState === 1) socket.send(JSON.stringify(values)); }
function seconds(value) { return value === null || value === undefined ? "-" : `${Math.round(value * 1000)} ms`; }

function buttons(running) {
  at("start").disabled = running;
  for (const id of ["stop", "interrupt", "change"]) at(id).disabled = !running;
}

async function openMicrophone() {
  if (!at("microphone").checked) return null;
  try {
    return await navigator.mediaDevices.getUserMedia({
      audio: { echoCancellation: true, noiseSuppression: true, channelCount: 1 },
    });
  } catch (error) {
    show(`no microphone: ${error.message}`);
    return null;
  }
}

function pcm(samples) {
  const whole = new Int16Array(samples.length);
  for (let i = 0; i < samples.length; i++) whole[i] = Math.max(-1, Math.min(1, samples[i])) * 32767;
  return whole;
}

async function sendMicrophone(stream) {
  audio = new AudioContext();
  await audio.audioWorklet.addModule(`microphone.js${query}`);
  const node = new AudioWorkletNode(audio, "microphone");
  node.port.onmessage = (event) => {
    if (socket && socket.readyState === 1) socket.send(pcm(event.data).buffer);
  };
  audio.createMediaStreamSource(stream).connect(node);
  return audio.sampleRate;
}

function base64(whole) {
  const bytes = new Uint8Array(whole.buffer, whole.byteOffset, whole.byteLength);
  let text = "";
  for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
  return btoa(text);
}

// A long file follows as its sound is shown: the server takes two minutes at most.
async function sendFile(file) {
  if (live.state !== "running") { show("press Start first, then choose the file"); return; }
  const mine = ++speaking;
  const rate = 24000;
  const context = new OfflineAudioContext(1, 1, rate);
  const sound = await context.decodeAudioData(await file.arrayBuffer());
  const whole = pcm(sound.getChannelData(0));
  const piece = rate * 2;
  for (let i = 0; i < whole.length; i += piece) {
    const last = i + piece >= whole.length;
    const seen = live.chunks;
    const far = i / rate > MOST_SENT_S;
    send({ type: "session.audio", rate, audio: base64(whole.subarray(i, i + piece)), last });
    do {
      if (far) await new Promise((done) => setTimeout(done, 50));
      if (speaking !== mine || live.state !== "running") return;
    } while (far && (live.chunks === seen || live.last.waiting > MOST_SENT_S / 2));
  }
}

function append() {
  if (!source || source.updating || !queue.length) return;
  const video = at("video");
  const ranges = video.buffered;
  if (ranges.length && video.currentTime - ranges.start(0) > 20) {
    source.remove(0, video.currentTime - 10);
    return;
  }
  source.appendBuffer(queue.shift());
}

function openMedia(mime) {
  const video = at("video");
  media = new MediaSource();
  queue = [];
  video.src = URL.createObjectURL(media);
  media.addEventListener("sourceopen", () => {
    source = media.addSourceBuffer(mime);
    source.mode = "segments";
    source.addEventListener("updateend", append);
    append();
  }, { once: true });
}

function keepUp() {
  const video = at("video");
  const ranges = video.buffered;
  if (!ranges.length || live.transport !== "m4s") return;
  const end = ranges.end(ranges.length - 1);
  if (video.currentTime < ranges.start(ranges.length - 1)) video.currentTime = ranges.start(ranges.length - 1);
  const ahead = end - video.currentTime;
  if (ahead > 3 * MOST_BUFFERED_S) video.currentTime = end - 0.1;
  else video.playbackRate = ahead > MOST_BUFFERED_S ? 1.05 : 1;
  at("buffered").textContent = seconds(ahead);
  live.buffered = ahead;
}

function onMessage(event) {
  if (typeof event.data !== "string") {
    queue.push(event.data);
    append();
    return;
  }
  const message = JSON.parse(event.data);
  if (message.type === "video.start") {
    live.started = message;
    if (message.sdp) peer.setRemoteDescription({ type: "answer", sdp: message.sdp });
    else openMedia(message.mime);
    live.state = "running";
    show(`running: ${message.width} x ${message.height}, ${message.fps} frames a second, ${live.transport}`);
  } else if (message.type === "video.chunk_metadata") {
    live.chunks += 1;
    live.last = message;
    if (message.delay !== null) at("delay").textContent = seconds(message.delay);
    at("block").textContent = seconds(message.block_s);
    at("waiting").textContent = `${message.waiting.toFixed(1)} s`;
    at("dropped").textContent = message.dropped;
    keepUp();
  } else if (message.type === "session.note") {
    show(message.text);
  } else if (message.type === "error") {
    live.errors.push(message.message);
    show(`error: ${message.message}`);
  } else if (message.type === "session.done") {
    live.state = "done";
    show(`ended: ${message.reason}`);
  }
}

async function offer(stream) {
  peer = new RTCPeerConnection();
  peer.addTransceiver("video", { direction: "recvonly" });
  if (stream) peer.addTransceiver(stream.getAudioTracks()[0], { direction: "sendrecv" });
  else peer.addTransceiver("audio", { direction: "recvonly" });
  const incoming = new MediaStream();
  peer.ontrack = (event) => {
    incoming.addTrack(event.track);
    at("video").srcObject = incoming;
  };
  await peer.setLocalDescription(await peer.createOffer());
  await new Promise((done) => {
    if (peer.iceGatheringState === "complete") done();
    else peer.addEventListener("icegatheringstatechange", () => peer.iceGatheringState === "complete" && done());
    setTimeout(done, 2000);
  });
  return peer.localDescription.sdp;
}

async function connect(transport, stream) {
  live.transport = transport;
  const start = { type: "session.start", format: transport };
  const prompt = at("prompt").value.trim();
  if (prompt) start.prompt = prompt;
  if (transport === "webrtc") start.sdp = await offer(stream);
  socket = new WebSocket(socketAddress);
  socket.binaryType = "arraybuffer";
  socket.onmessage = onMessage;
  socket.onclose = (event) => {
    if (live.state === "switching") return;
    if (![1000, 1008].includes(event.code)) show(`error: the connection was cut (${event.code}); press Start again`);
    end();
  };
  await new Promise((done, failed) => { socket.onopen = done; socket.onerror = () => failed(new Error("no connection")); });
  if (transport === "m4s" && stream) start.rate = await sendMicrophone(stream);
  send(start);
  pinging = setInterval(() => send({ type: "session.ping" }), 5000);
}

async function begin() {
  buttons(true);
  show("connecting");
  live.state = "connecting";
  live.chunks = 0;
  microphone = await openMicrophone();
  const wanted = at("transport").value;
  try {
    await connect(wanted === "m4s" ? "m4s" : "webrtc", microphone);
    if (wanted === "auto") setTimeout(fallBack, 6000);
    at("video").play().catch(() => {});
  } catch (error) {
    show(`error: ${error.message}`);
    end();
  }
}

// WebRTC that does not connect, as behind some firewalls, gives way to MP4 over the WebSocket.
async function fallBack() {
  if (!peer || peer.connectionState === "connected" || live.state === "done" || live.state === "idle") return;
  live.state = "switching";
  release();
  live.state = "connecting";
  await connect("m4s", microphone);
}

function release() {
  clearInterval(pinging);
  if (socket) { socket.onclose = null; socket.close(); }
  if (peer) peer.close();
  if (audio) audio.close();
  const video = at("video");
  video.srcObject = null;
  video.removeAttribute("src");
  socket = peer = media = source = audio = null;
}

function end() {
  release();
  if (microphone) for (const track of microphone.getTracks()) track.stop();
  microphone = null;
  if (live.state !== "done") live.state = "idle";
  buttons(false);
}

at("start").onclick = begin;
at("stop").onclick = () => { send({ type: "session.stop" }); };
at("interrupt").onclick = () => { speaking++; send({ type: "session.interrupt" }); };
at("change").onclick = () => { send({ type: "session.interaction", event: { prompt: at("prompt").value } }); };
at("file").onchange = () => {
  const chosen = at("file").files[0];
  at("file").value = ""; // so that the same file can be chosen again
  if (chosen) sendFile(chosen).catch((error) => show(`error: ${chosen.name} is no sound that this browser reads (${error.message})`));
};
buttons(false); // the document comes before this file, and a press of Start is for nothing until here
