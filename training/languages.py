"""French and German for eSpeak NG: sentences from small grammars, and the mouth's phones for its phonemes.

The words and patterns were written for this project. Sounds that English lacks get the English phone whose
mouth is most like theirs: rounded front vowels that of UW or ER, nasal vowels that of their vowel, the R of
the throat that of HH, which leaves the lips alone.
"""

from __future__ import annotations

import re

import numpy as np

LANGUAGES = ("fr", "de")
PHONES = {
    "y": "UW", "y:": "UW", "Y": "UW", "Y:": "UW", "y-": "W", "W": "ER", "W~": "ER", "A~": "AA", "O~": "AO",
    "E~": "AE", "@-": "AH", "a-": "AE", "e-": "EY", "z2": "Z", "n^": "N Y", "r": "HH", "R": "HH", "r-": "HH",
    "pF": "P F", "ts": "T S", "OY": "OY", "_!": "",
}  # fmt: skip
"""Those that differ from English, by eSpeak's name."""

_WORDS = {
    "fr": {
        "name": "Marie Pierre Lucie Hugo Camille Antoine Zoé Bruno Juliette Benoît",
        "person": "le_boulanger la_voisine mon_oncle le_peintre une_amie le_juge ma_mère le_pêcheur la_reine",
        "thing": "une_bouteille le_panier mon_vélo un_beau_miroir la_fenêtre le_parapluie un_bateau la_jupe",
        "food": "du_pain du_beurre des_pommes une_soupe_chaude du_fromage un_œuf du_miel des_champignons",
        "place": "la_forêt le_marché la_maison l'église le_pont la_montagne la_plage un_jardin le_bureau",
        "verb": "trouve porte achète regarde oublie peint cherche vend montre lave bouge pousse",
        "when": "ce_matin hier_soir au_mois_de_juin chaque_jour sans_un_mot peut-être bientôt à_huit_heures",
        "reply": "oui non merci_beaucoup bien_sûr pourquoi_pas bonjour pas_du_tout voilà",
    },
    "de": {
        "name": "Anna Peter Jürgen Ulrike Moritz Sophie Boris Käthe Fabian Bettina",
        "person": "der_Bäcker die_Nachbarin mein_Onkel der_Maler eine_Freundin der_Richter meine_Mutter",
        "thing": "eine_Flasche den_Korb mein_Fahrrad den_alten_Spiegel das_Fenster den_Schirm ein_Boot",
        "food": "Brot Butter Äpfel eine_warme_Suppe Käse ein_Ei Honig Pilze Pflaumenkuchen",
        "place": "im_Wald auf_dem_Markt im_Haus vor_der_Kirche über_der_Brücke am_Berg im_Büro am_Meer",
        "verb": "findet trägt kauft beobachtet vergisst malt sucht verkauft zeigt wäscht bewegt schiebt",
        "when": "heute_früh gestern_Abend im_Juni jeden_Tag ohne_ein_Wort vielleicht bald um_zwölf_Uhr",
        "reply": "ja nein vielen_Dank natürlich warum_nicht guten_Morgen überhaupt_nicht bitte",
    },
}
_PATTERNS = {
    "fr": (
        "{person} {verb} {thing} dans {place}",
        "{reply}, {name} {verb} {food} {when}",
        "{when}, {name} et {name} vont vers {place}",
        "nous avons mangé {food}, {food} et {food}",
        "est-ce que {person} {verb} {thing}? {reply}",
        "je pense que {person} {verb} toujours {thing} {when}",
    ),
    "de": (
        "{person} {verb} {thing} {place}",
        "{reply}, {name} {verb} {food} {when}",
        "{when} gehen {name} und {name} spazieren, {place}",
        "wir essen {food}, {food} und {food}",
        "glaubst du, {person} {verb} {thing}? {reply}",
        "ich weiß, dass {name} und {person} {place} wohnen",
    ),
}


def foreign_sentence(rng: np.random.Generator, language: str) -> str:
    """One random sentence in one of LANGUAGES."""
    words = _WORDS[language]

    def fill(match: re.Match[str]) -> str:
        return str(rng.choice(words[match[1]].split())).replace("_", " ")

    text = re.sub(r"\{(\w+)\}", fill, str(rng.choice(_PATTERNS[language])))
    return text[0].upper() + text[1:] + "."
