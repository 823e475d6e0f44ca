// What is odd about a portrait or a voice, and what to do: before a run from the page's check, then from the worker.
import { Problem, postForm, videoForm } from "./api.js";
import { at, el } from "./dom.js";
import { t } from "./strings.js";

const NAMES = { input_reference: "warned_portrait", audio_reference: "warned_voice" };

// A warning as a sentence that names its input.
export function warningText({ message, param }) {
  const text = message.replace(/^(image|audio|prompt): /, "").replace(/\.$/, "");
  return t(NAMES[param] ?? "warned", { text });
}

// Shows warnings in a place that is hidden without any.
export function showWarnings(place, warnings) {
  const texts = warnings.map(warningText);
  if (place.dataset.shown === JSON.stringify(texts)) return; // a screen reader reads it once
  place.dataset.shown = JSON.stringify(texts);
  place.replaceChildren(...texts.map((text) => el("p", {}, text)));
  place.hidden = !texts.length;
}

export class Check {
  #inputs = [];
  #running = new AbortController();

  // Asks again if portrait, voice, model or size are others.
  async refresh({ prompt, model, size, input_reference, audio_reference }) {
    const inputs = [input_reference, audio_reference, model, size];
    if (inputs.every((each, place) => each === this.#inputs[place])) return;
    this.#inputs = inputs;
    this.#running.abort();
    const running = (this.#running = new AbortController());
    this.#show([]);
    at("check-text").textContent = t("check_running");
    try {
      const form = videoForm({ prompt: prompt || "-", model, size, input_reference, audio_reference });
      const { warnings } = await postForm("/page/warnings", form, { signal: running.signal });
      at("check-text").textContent = "";
      this.#show(warnings);
    } catch (problem) {
      if (problem.name === "AbortError") return;
      if (!(problem instanceof Problem)) throw problem;
      at("check-text").textContent = problem.offline ? "" : t("check_failed", { message: problem.message });
      this.#inputs = [];
    }
  }

  // No files are chosen, or the server refuses them.
  clear() {
    this.#running.abort();
    this.#inputs = [];
    at("check-text").textContent = "";
    this.#show([]);
  }

  #show(warnings) {
    for (const [param, id] of [["input_reference", "portrait-warning"], ["audio_reference", "voice-warning"]]) {
      showWarnings(at(id), warnings.filter((each) => each.param === param));
    }
  }
}
