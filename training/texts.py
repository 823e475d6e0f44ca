"""Random sentences for the synthesisers, from a small grammar over word lists.

The words and patterns were written for this project. All phones of English occur; numbers, names, questions
and short answers vary rhythm and length.
"""

from __future__ import annotations

import re

import numpy as np

_LISTS = {
    "name": "Anna Peter Ruth George Maya Oliver Zoe Thomas Fay Victor Joyce Hugh Leah Mark Judith Paul "
    "Sheila Boris "
    "Vivian Chuck Theo Naomi Walter Yvonne Quentin Beth",
    "person": "teacher baker farmer judge neighbor sailor nurse painter child stranger doctor uncle cousin "
    "shepherd tailor pilot guard poet mother father brother fisherman carpenter watchmaker",
    "thing": "book bottle bicycle basket mirror blanket hammer letter candle piano kettle window umbrella "
    "wagon "
    "jacket shovel garden engine puzzle lantern feather village orchard bridge telephone ship ladder "
    "machine treasure photograph toothbrush vegetable mushroom fountain thermometer violin",
    "animal": "fox dog horse goat sheep rabbit bird pigeon whale frog beaver mouse chicken bear zebra moth "
    "giraffe thrush",
    "food": "bread butter cheese soup apples fish pie honey porridge potatoes mushrooms jam chowder coffee "
    "beef "
    "garlic yoghurt plums",
    "place": "house forest harbor market valley kitchen beach river church mountain station field library "
    "theatre "
    "office cellar shore pathway zoo",
    "adjective": "old small bright heavy quiet broken yellow foolish gentle smooth thick narrow brave "
    "curious "
    "purple enormous fresh warm empty usual strange rough cheap thin wooden beautiful shiny joyful vague "
    "cozy",
    "verb": "found carried painted bought watched sold borrowed washed pushed polished measured followed "
    "forgot described moved chose offered lifted brought showed remembered threw hid cooked shaved",
    "moves": "walked jumped ran sailed climbed slipped hurried marched wandered crept rushed galloped "
    "drove moved "
    "rode turned flew",
    "adverb": "slowly quickly quietly very_carefully with_great_joy without_a_word almost_every_day "
    "once_more "
    "before_breakfast after_the_storm all_by_herself in_the_evening this_morning by_mistake on_purpose "
    "twice_a_week",
    "where": "over under behind through above beside across around near beyond toward",
    "number": "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty "
    "a_hundred a_thousand",
    "feel": "happy tired certain worried proud ashamed glad surprised hungry thirsty angry calm",
    "reply": "yes no maybe of_course not_at_all well oh I_see thank_you sure hmm why_not good_morning wow",
}
_PATTERNS = (
    "the {adjective} {person} {verb} the {thing}",
    "{name} {verb} {number} {adjective} {thing}s {where} the {place}",
    "the {animal} {moves} {where} the {adjective} {place} {adverb}",
    "{adverb}, {name} and {name} {moves} {where} the {place}",
    "we had {food} and {food} with a little {food}",
    "did the {person} ever {moves} to the {place}? {reply}, {adverb}",
    "{reply}, I {verb} your {thing} {adverb}",
    "she was {feel} that the {thing} was {adjective}, but he was {feel}",
    "please put the {adjective} {thing} {where} the {thing}",
    "there were {number} {animal}s and {number} {person}s in the {place}",
    "what a {adjective} {thing}! who {verb} it for {name}",
    "my {person} thinks the {food} in this {place} is much too {adjective}",
    "if you should see {name}, say that the {animal} {moves} away {adverb}",
    "both the {thing} and the {thing} belong to the {adjective} {person}",
    "it takes {number} minutes to go from the {place} to the {place}",
    "{reply}. {reply}. {name} {moves} home {adverb}",
    "how many {thing}s could a {person} carry {where} a {adjective} {place}",
    "the voice of the {person} was {adjective} and {adjective}",
    "they usually measure the {thing} with a {adjective} {thing}",
    "nobody {verb} the {animal}, so it {moves} {where} the {thing} and {moves} {where} the {place}",
    "choose one: {food}, {food}, or {food}",
    "I am {feel}",
    "{name}, {name}, {name} and {name} {verb} {number} {thing}s",
    "far away {where} the {place} lives a {adjective} {animal} with {number} {adjective} {thing}s",
)


def sentence(rng: np.random.Generator) -> str:
    """One random sentence."""
    pattern = str(rng.choice(_PATTERNS))

    def fill(match: re.Match[str]) -> str:
        return str(rng.choice(_LISTS[match[1]].split())).replace("_", " ")

    text = re.sub(r"\{(\w+)\}", fill, pattern)
    return text[0].upper() + text[1:] + ("?" if pattern.startswith(("how", "did")) else ".")
