// What a video takes before it runs: length, size, work, time and cost, from the server's planner.
import { Problem, getJson, postForm, postJson, videoForm } from "./api.js";
import { at, complain, el, later } from "./dom.js";
import { count, duration, t } from "./strings.js";
import { Check } from "./warnings.js";

const AGAIN_MS = 2000;
const FIELDS = { input_reference: ["portrait-problem", "portrait-file"], audio_reference: ["voice-problem", "voice-file"], prompt: ["prompt-problem", "prompt"], size: ["size-problem", null] };

// Shows an error beside its field, else at the end of the form; returns the field.
export function showProblem(problem) {
  const key = problem.param?.replace(/^extra_params\./, "");
  const setting = key && document.getElementById(`problem-${key}`);
  const text = problem.message.replace(/^(input_reference|audio_reference|prompt|size|extra_params\.\w+): /, "");
  if (setting) {
    at("advanced").open = true;
    complain(setting.id, text, at(`set-${key}`));
    return at(`set-${key}`);
  }
  const [place, field] = FIELDS[problem.param] ?? ["form-problem", null];
  complain(place, text, field && at(field));
  return field ? at(field) : at("make");
}

export class Plan {
  #running = new AbortController();
  #timer = 0;
  #check = new Check();

  constructor(info, request) {
    this.info = info;
    this.request = request;
    this.refresh = later(() => this.#refresh(), 200);
  }

  async #refresh() {
    clearTimeout(this.#timer);
    this.#running.abort();
    const running = (this.#running = new AbortController());
    const { form, choices, voice } = this.request();
    complain("form-problem");
    try {
      const found = form.input_reference ? await this.#estimate(form, running.signal) : null;
      await this.#times(choices, found, voice, running.signal);
      if (found) this.#check.refresh(form);
      else this.#check.clear();
    } catch (problem) {
      if (problem.name === "AbortError") return;
      this.#check.clear();
      at("plan-text").textContent = t("plan_waiting");
      at("plan-facts").replaceChildren();
      if (problem instanceof Problem && !problem.offline) showProblem(problem);
      else if (!problem.offline) throw problem;
    }
  }

  async #estimate(form, signal) {
    at("plan-text").textContent = t("plan_checking");
    const prompt = form.prompt || "-";
    const found = await postForm("/v1/videos/estimate", videoForm({ ...form, prompt }), { signal });
    this.#show(found, Boolean(form.audio_reference));
    return found;
  }

  // The time of each intent, for the length of this video.
  async #times(choices, found, voice, signal) {
    const { model, size } = choices;
    const silence = this.info.models.find(({ id }) => id === model.id).silence;
    const seconds = !voice.file ? null : found ? Math.max(0.1, found.seconds - silence) : voice.seconds;
    const { times, measuring } = await postJson("/page/times", { model: model.id, size, seconds }, { signal });
    choices.showTimes(times, measuring);
    if (!found) {
      at("plan-text").textContent = t("plan_waiting");
      at("plan-facts").replaceChildren();
    }
    if (measuring) this.#timer = setTimeout(() => this.#refresh(), AGAIN_MS);
  }

  #show(found, hasVoice) {
    const { price_per_hour: price } = this.info;
    const own = found.compute_seconds;
    const all = own === null ? null : own + (found.wait_seconds ?? 0);
    const clock = (seconds) => new Date(Date.now() + 1000 * seconds).toLocaleTimeString("en", { hour: "2-digit", minute: "2-digit", hour12: false });
    const amount = () => ((own * price) / 3600).toPrecision(2);
    const facts = [
      ["plan_length", duration(found.seconds)],
      ["plan_size", found.size.replace("x", " × ")],
      ["plan_work", t("plan_work_value", { windows: count(found.windows, "windows"), steps: count(found.steps, "steps") })],
      ["plan_time", own === null ? t("plan_unknown") : `≈ ${duration(own)}`],
      ["plan_ready", all === null ? t("plan_unknown") : clock(all)],
      ["plan_cost", !price ? t("plan_free") : own === null ? t("plan_unknown") : t("plan_price", { amount: amount(), price })],
    ];
    at("plan-facts").replaceChildren(...facts.map(([key, value]) => el("div", { id: key.replace("_", "-") }, el("dt", {}, t(key)), el("dd", {}, value))));
    const texts = [];
    if (!hasVoice) texts.push(t("voice_none", { seconds: duration(found.seconds) }));
    if (found.queue_position) texts.push(t("plan_after", { count: found.queue_position }));
    at("plan-text").textContent = texts.join(" ");
  }
}

export async function loadInfo() {
  return getJson("/page/info");
}
