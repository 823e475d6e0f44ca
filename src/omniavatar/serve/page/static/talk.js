// The conversation with the portrait, in a frame: the page of `omniavatar live`, from the same process.
import { postForm, videoForm } from "./api.js";
import { at, complain } from "./dom.js";
import { t } from "./strings.js";

export function setUpTalk(info, portrait) {
  const offer = info.talk;
  at("talk-start").disabled = !offer.available;
  at("talk-note").hidden = offer.available;
  at("talk-note").textContent = offer.available ? "" : t("talk_none", { remedy: offer.remedy });
  at("talk-start").onclick = async () => {
    complain("talk-problem");
    try {
      if (portrait.file) await postForm("/page/talk", videoForm({ input_reference: portrait.file }));
    } catch (problem) {
      complain("talk-problem", problem.message);
      return;
    }
    const frame = at("talk-frame");
    frame.src = `${offer.name}/`;
    frame.hidden = false;
    frame.focus();
  };
}

export function showTalk(portrait) {
  at("talk-who").textContent = portrait.file ? t("talk_with", { name: portrait.file.name }) : t("talk_default");
}
