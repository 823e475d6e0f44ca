// The voice: a file, a dropped file, the microphone, a spoken text, or the example.
import { getFile } from "./api.js";
import { at, complain, onDrop } from "./dom.js";
import { duration, t } from "./strings.js";

const SOURCES = ["file", "record", "text"];

export class Voice {
  #address = "";
  #recorder = null;
  file = null;
  seconds = null;

  constructor(changed, offer) {
    this.changed = changed;
    for (const input of document.querySelectorAll("[name=voice-from]")) input.onchange = () => this.#source(input.value);
    at("voice-file").onchange = (event) => {
      const [file] = event.target.files;
      if (file) this.use(file);
      event.target.value = "";
    };
    onDrop(at("voice-drop"), (file) => this.use(file));
    at("voice-example").onclick = () => this.useExample();
    at("voice-remove").onclick = () => this.clear();
    at("record").onclick = () => (this.#recorder ? this.#recorder.stop() : this.#record());
    at("speak").onclick = () => this.#speak();
    at("speak").disabled = !offer.available;
    at("speech-hint").textContent = offer.available ? t("speech_by", { name: offer.name }) : t("speech_none", { remedy: offer.remedy });
    const audio = at("voice-audio");
    audio.onloadedmetadata = () => {
      this.seconds = Number.isFinite(audio.duration) ? audio.duration : null;
      if (this.file) this.#name();
    };
  }

  use(file) {
    this.file = file;
    this.seconds = null;
    URL.revokeObjectURL(this.#address);
    this.#address = URL.createObjectURL(file);
    at("voice-audio").src = this.#address;
    at("voice-chosen").hidden = false;
    this.#name();
    complain("voice-problem", "", at("voice-file"));
    this.changed();
  }

  clear() {
    this.file = this.seconds = null;
    at("voice-audio").removeAttribute("src");
    at("voice-chosen").hidden = true;
    at("voice-name").textContent = "";
    complain("voice-problem", "", at("voice-file"));
    this.changed();
  }

  async useExample() {
    await this.#fetch("/page/example/voice", "example.flac", "audio/flac");
  }

  #name() {
    const seconds = this.seconds === null ? null : duration(this.seconds);
    at("voice-name").textContent = seconds ? t("voice_named", { name: this.file.name, seconds }) : this.file.name;
  }

  #source(chosen) {
    for (const name of SOURCES) at(`voice-${name}-panel`).hidden = name !== chosen;
  }

  async #fetch(path, name, type, options) {
    try {
      this.use(await getFile(path, name, type, options));
    } catch (problem) {
      complain("voice-problem", problem.message);
    }
  }

  async #speak() {
    const text = at("speech-text").value.trim();
    if (!text) {
      complain("voice-problem", t("speech_empty"));
      at("speech-text").focus();
      return;
    }
    complain("voice-problem");
    const button = at("speak");
    button.disabled = true;
    button.textContent = t("speaking");
    const headers = { "Content-Type": "application/json" };
    await this.#fetch("/v1/audio/speech", t("speech_name"), "audio/wav", { method: "POST", headers, body: JSON.stringify({ input: text }) });
    button.textContent = t("speak");
    button.disabled = false;
  }

  async #record() {
    complain("voice-problem");
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    } catch (error) {
      complain("voice-problem", t("no_microphone", { reason: error.message }));
      return;
    }
    const pieces = [];
    const recorder = (this.#recorder = new MediaRecorder(stream));
    const stopMeter = this.#meter(stream);
    recorder.ondataavailable = (event) => pieces.push(event.data);
    recorder.onstop = () => {
      stopMeter();
      for (const track of stream.getTracks()) track.stop();
      this.#recorder = null;
      at("record").textContent = t("record");
      at("record").classList.remove("danger");
      this.use(new File(pieces, t("recorded_name"), { type: recorder.mimeType }));
    };
    recorder.start();
    at("record").textContent = t("record_stop");
    at("record").classList.add("danger");
  }

  // Shows the loudness and the time until the returned function is called.
  #meter(stream) {
    const audio = new AudioContext();
    const meter = audio.createAnalyser();
    audio.createMediaStreamSource(stream).connect(meter);
    const samples = new Float32Array(meter.fftSize);
    const begun = performance.now();
    const timer = setInterval(() => {
      meter.getFloatTimeDomainData(samples);
      at("level").value = Math.min(1, 1.5 * samples.reduce((most, value) => Math.max(most, Math.abs(value)), 0));
      const seconds = Math.floor((performance.now() - begun) / 1000);
      at("record-time").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    }, 100);
    return () => {
      clearInterval(timer);
      audio.close();
      at("level").value = 0;
    };
  }
}
