"""The formats and codecs that are opened: those of recorders, editors, phones and speech servers.

FFmpeg knows many more. Left out are formats that name other files (playlists, image sequences, scripts,
streaming manifests), devices, raw samples without a header (their rate is unknown), and those of old games.
"""

from __future__ import annotations

FORMATS = (
    "3gp", "aac", "ac3", "aiff", "amr", "amrnb", "amrwb", "ape", "aptx", "aptx_hd", "asf", "asf_o", "au",
    "avi", "caf", "dsf", "dts", "dtshd", "eac3", "flac", "flv", "g722", "g729", "gsm", "iff", "ilbc",
    "ircam", "loas", "matroska", "mlp", "mov", "mp3", "mpc", "mpc8", "mpeg", "mpegts", "mxf", "nistsphere",
    "nut", "ogg", "oma", "osq", "qcp", "qoa", "rm", "sbc", "shn", "sox", "spdif", "tak", "truehd", "tta",
    "vivo", "voc", "w64", "wav", "webm", "wsd", "wtv", "wv", "xwma",
)  # fmt: skip

AUDIO_DECODERS = (
    "8svx_exp", "8svx_fib", "aac", "aac_latm", "ac3", "adpcm_ima_qt", "adpcm_ima_wav", "adpcm_ms",
    "adpcm_sbpro_2", "adpcm_sbpro_3", "adpcm_sbpro_4", "adpcm_swf", "adpcm_yamaha", "alac", "als", "amrnb",
    "amrwb", "ape", "aptx", "aptx_hd", "atrac1", "atrac3", "atrac3al", "atrac3plus", "atrac3plusal",
    "atrac9", "cook", "dca", "dsd_lsbf", "dsd_lsbf_planar", "dsd_msbf", "dsd_msbf_planar", "dst", "dvaudio",
    "eac3", "evrc", "flac", "g722", "g723_1", "g726", "g726le", "g728", "g729", "gsm", "gsm_ms", "ilbc",
    "imc", "libopencore_amrnb", "libopencore_amrwb", "libopus", "libvorbis", "mace3", "mace6", "mlp", "mp1",
    "mp1float", "mp2", "mp2float", "mp3", "mp3adu", "mp3adufloat", "mp3float", "mp3on4", "mp3on4float",
    "mpc7", "mpc8", "nellymoser", "opus", "osq", "qcelp", "qdm2", "qdmc", "qoa", "ralf", "real_144",
    "real_288", "s302m", "sbc", "shorten", "sipr", "speex", "tak", "truehd", "truespeech", "tta", "twinvq",
    "vorbis", "wavpack", "wmalossless", "wmapro", "wmav1", "wmav2", "wmavoice", "xma1", "xma2", "pcm_alaw",
    "pcm_bluray", "pcm_dvd", "pcm_f16le", "pcm_f24le", "pcm_f32be", "pcm_f32le", "pcm_f64be", "pcm_f64le",
    "pcm_lxf", "pcm_mulaw", "pcm_s16be", "pcm_s16be_planar", "pcm_s16le", "pcm_s16le_planar", "pcm_s24be",
    "pcm_s24daud", "pcm_s24le", "pcm_s24le_planar", "pcm_s32be", "pcm_s32le", "pcm_s32le_planar",
    "pcm_s64be", "pcm_s64le", "pcm_s8", "pcm_s8_planar", "pcm_u16be", "pcm_u16le", "pcm_u24be", "pcm_u24le",
    "pcm_u32be", "pcm_u32le", "pcm_u8", "pcm_vidc",
)  # fmt: skip

VIDEO_DECODERS = ("h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d", "av1")
