// A complete client of the realtime endpoint for Dart 3.7 or newer and for Flutter on phones and desktops, without
// packages. Flutter on the web has no dart:io. timeline.dart must be in the same folder; its header says what differs
// from the Python client. Otherwise the rules are those of voxtral_client/transcriber.py. See PROTOCOL.md.
//
//   dart examples/client.dart talk.wav [ws://HOST:8000/v1/realtime]     the key comes from VLLM_API_KEY
//
// It prints each word of talk.wav (16 kHz, mono, 16 bit, header of 44 bytes) with its end in seconds. In an app:
//
//   final transcription = Transcription(Uri.parse(url), key: key, onWord: ..., onPartial: ..., onState: ...);
//   transcription.add(samples);         // Int16List, 16 kHz mono, whenever there are some
//   transcription.end();                // then the last words come
//   await transcription.finished;       // throws Refused or SessionLost, after the words before it
import 'dart:async';
import 'dart:convert';
import 'dart:io';
import 'dart:math';
import 'dart:typed_data';

import 'timeline.dart';

const ahead = 5 * rate; // longest audio ahead of the deltas: enough to keep the server busy, little to send again
const piece = rate ~/ 4; // longest audio in one message
const rollover = 75 * rate; // in stock vLLM each frame of a session takes longer than the one before
const flatRollover = 300 * rate; // where /v1/models says that it does not
const keep = 300 * rate; // audio kept through an outage: 9.6 MB

sealed class Failure implements Exception {
  Failure(this.message);
  final String message;
  @override
  String toString() => message;
}

/// Trying again is useless.
class Refused extends Failure {
  Refused(super.message);
}

/// A new session can continue where this one stopped. [busy]: all sessions of the server are taken.
class SessionLost extends Failure {
  SessionLost(super.message, {this.busy = false});
  final bool busy;
}

/// One transcription, in one session after another. States: "connecting", "listening", "waiting" with the reason,
/// "lost" with the audio that was never transcribed, "done". [context]: certificates to trust. The longest times:
/// [giveUp] without progress, [stall] without a delta, [answer] without a reply to a request.
class Transcription {
  Transcription(Uri url,
      {this.key, this.model, this.context, required this.onWord, this.onPartial, this.onState,
      this.giveUp = const Duration(minutes: 2),
      this.stall = const Duration(seconds: 20),
      this.answer = const Duration(seconds: 10)})
      : url = url.replace(path: url.path.replaceFirst(RegExp(r'/+$'), '')) {
    finished = Future(_run).whenComplete(() => _changed(over: true))..ignore(); // an app may await it later
  }

  final Uri url; // ws://HOST:8000/v1/realtime
  final String? key;
  String? model;
  final SecurityContext? context;
  final Duration giveUp, stall, answer;
  final void Function(Word word) onWord;
  final void Function(String text)? onPartial;
  final void Function(String state, String message)? onState;
  late final Future<void> finished;

  final _timeline = Timeline(), _clock = Stopwatch()..start();
  bool _ended = false, _over = false;
  int _limit = 0, _rollover = 0; // samples of one session
  void Function() _pump = () {};
  Completer<void> _change = Completer();

  Map<String, String> get _headers => {if (key != null) 'Authorization': 'Bearer $key'};

  void add(Int16List samples) {
    _timeline.addAudio(samples);
    final start = _timeline.received - keep, from = max(_timeline.committed, min(_timeline.transcribed, start));
    if (start > _timeline.committed) _timeline.commit(start).forEach(onWord);
    if (start > from) onState?.call('lost', 'audio from ${from / rate} to ${start / rate} s is lost');
    _changed();
  }

  void end() {
    _ended = true;
    _changed();
  }

  /// Wait here before [add] if the audio can wait (a file); a microphone cannot.
  Future<void> room() async {
    while (!_over && _timeline.received - _timeline.transcribed > 2 * ahead) await _change.future;
  }

  void _changed({bool over = false}) {
    _over |= over;
    _pump();
    _change.complete();
    _change = Completer();
  }

  Future<void> _run() async {
    if (!RegExp(r'^wss?://.+/realtime$').hasMatch('$url')) throw Refused('$url: write ws://HOST:8000/v1/realtime');
    var failures = 0, furthest = 0, since = _clock.elapsed;
    onState?.call('connecting', '');
    while (true) {
      while (_timeline.received <= _timeline.committed && !_ended) await _change.future;
      if (_timeline.received <= _timeline.committed) break;
      try {
        _timeline.begin(); // or an earlier session would count as idle
        await _session(await _connect(failures > 0 || _limit == 0));
        failures = 0;
        onState?.call('connecting', '');
      } on SessionLost catch (lost) {
        final idle = !_ended && _timeline.frames > 0 && _timeline.received - _timeline.transcribed < 3 * rate;
        // A repetition is no progress.
        if (_timeline.transcribed > furthest || idle || lost.busy) failures = 0;
        furthest = max(furthest, _timeline.transcribed);
        if (failures == 0) since = _clock.elapsed;
        if (_clock.elapsed - since > giveUp) throw SessionLost('gave up: $lost');
        onState?.call('waiting', lost.busy ? '$lost: waiting for a free one' : '$lost; trying again');
        if (!lost.busy) failures += 1;
        final wait = lost.busy ? 2000 : min(8000, 250 << min(failures, 5));
        await Future<void>.delayed(Duration(milliseconds: (wait * (0.5 + Random().nextDouble())).round()));
      }
    }
    onPartial?.call('');
    onState?.call('done', '');
  }

  /// Open a WebSocket; [ask] /v1/models first, if its answer is not known or may have changed.
  Future<WebSocket> _connect(bool ask) async {
    final http = HttpClient(context: context)..connectionTimeout = answer..findProxy = null; // at home: no proxy
    Never absent() => throw SessionLost('no server answers');
    try {
      if (ask) await _ask(http).timeout(answer, onTimeout: absent);
      const plain = CompressionOptions.compressionOff; // base64 of sound hardly shrinks
      final opening = WebSocket.connect('$url', headers: _headers, customClient: http, compression: plain);
      return await opening.timeout(answer, onTimeout: absent);
    } on WebSocketException catch (error) {
      throw _refusal(error.httpStatusCode ?? 0);
    } on TlsException catch (error) {
      final trusted = !'$error'.contains('CERTIFICATE');
      throw trusted ? SessionLost('the TLS handshake failed') : Refused('the certificate is not trusted');
    } on IOException {
      absent();
    } finally {
      http.close(force: true); // this does not close an open WebSocket
    }
  }

  /// Ask for the name of the model and the longest session; a wrong key is refused here.
  Future<void> _ask(HttpClient http) async {
    final path = url.path.replaceFirst(RegExp(r'/realtime$'), '/models');
    final request = await http.getUrl(url.replace(scheme: url.isScheme('wss') ? 'https' : 'http', path: path));
    _headers.forEach(request.headers.set);
    final reply = await request.close(), text = await utf8.decodeStream(reply);
    if (reply.statusCode != 200) throw _refusal(reply.statusCode);
    try {
      final models = (jsonDecode(text) as Map)['data'] as List;
      final served = models.firstWhere((entry) => entry['id'] == model, orElse: () => models.first) as Map;
      model ??= served['id'] as String;
      final tokens = served['max_model_len'] as int?; // of them about 40 for the prompt
      _limit = tokens == null ? 2400 * rate : max(tokens - 80, tokens ~/ 2) * frame;
      _rollover = min(served['voxtral_speed'] == true ? flatRollover : rollover, _limit ~/ 2);
    } catch (_) {
      throw _refusal(200);
    }
  }

  Failure _refusal(int status) => switch (status) {
        401 => Refused('${key == null ? 'the server wants a key' : 'wrong API key'} (HTTP 401)'),
        403 => Refused('wrong path, or an origin that is not let in (HTTP 403)'),
        >= 500 => SessionLost('the server is not well (HTTP $status)'),
        _ => Refused('no realtime server (HTTP $status)'),
      };

  /// One session. Returns where a new one must continue or all is transcribed. Throws SessionLost or Refused.
  Future<void> _session(WebSocket socket) async {
    final timeline = _timeline, over = Completer<void>();
    socket.pingInterval = const Duration(seconds: 20);
    var sent = timeline.begin(), finishing = false, started = false, answered = _clock.elapsed;
    void send(String type, [Map<String, Object?> more = const {}]) => socket.add(jsonEncode({'type': type, ...more}));
    void tell(List<Word> words) => words.forEach(onWord);
    void finish() => over.isCompleted ? null : over.complete();
    void fail(Object error) => over.isCompleted ? null : over.completeError(error);

    /// Without a pause, the next session continues between two words.
    void cut() {
      final before = timeline.committed;
      tell(timeline.commitBetweenWords());
      if (timeline.committed == before) fail(SessionLost('the server ended the session before any word was final'));
      finish();
    }

    _pump = () {
      if (timeline.transcribed < timeline.committed) return finish(); // its audio was dropped
      while (started && !finishing) {
        final count = [piece, timeline.transcribed + ahead - sent, timeline.received - sent].reduce(min);
        if (count <= 0) break;
        final bytes = Uint8List.sublistView(timeline.audio(sent, count));
        sent += count;
        send('input_audio_buffer.append', {'audio': base64Encode(bytes)});
      }
      if (started && _ended && !finishing && sent >= timeline.received) {
        finishing = true;
        send('input_audio_buffer.commit', {'final': true});
      }
    };
    void receive(Map<String, dynamic> event) {
      switch (event) {
        case {'type': 'session.created'}:
          onState?.call('listening', '');
          send('session.update', {'model': model});
          send('input_audio_buffer.commit');
          started = true;
        case {'type': 'transcription.delta', 'delta': final String delta}:
          final before = timeline.committed;
          tell(timeline.addDelta(delta));
          onPartial?.call(timeline.partial.map((word) => word.text).join());
          final age = timeline.frames * frame;
          if (age > _limit || (age > 4 * _rollover && !finishing)) return cut(); // no pause
          if (age > _rollover && timeline.committed > before && !finishing) return finish();
        case {'type': 'transcription.done'}:
          if (timeline.frames == 0) return fail(SessionLost('the server ended the session without a word'));
          if (!finishing || timeline.transcribed < timeline.received + rate ~/ 4) return cut(); // the limit came first
          tell(timeline.commit(timeline.transcribed));
          return finish();
        case {'type': 'error', 'error': final String text}:
          final code = event['code'] ?? 'processing_error', busy = text.contains('currently busy');
          if (code != 'processing_error') return fail(Refused('the server refused a message ($code): $text'));
          return fail(SessionLost(busy ? 'all sessions of the server are taken' : 'server error: $text', busy: busy));
      }
      _changed();
    }

    void take(dynamic message) {
      if (over.isCompleted) return;
      answered = _clock.elapsed;
      try {
        receive(jsonDecode(message as String) as Map<String, dynamic>);
      } on FormatException {
        fail(Refused('a message was not JSON'));
      } catch (error) {
        fail(error); // an error of a callback
      }
    }

    String closing() => '${socket.closeCode ?? 1006} ${socket.closeReason ?? ''}'.trim();
    socket.listen(take,
        onError: (Object error) => fail(SessionLost('connection lost ($error)')),
        onDone: () => fail(SessionLost('connection lost (${closing()})')));
    final watch = Timer.periodic(const Duration(milliseconds: 500), (_) {
      final starved = started && sent - timeline.transcribed < 3 * rate && !_ended; // the server has nothing to do
      if (starved) answered = _clock.elapsed;
      final patience = started ? stall : answer;
      if (_clock.elapsed - answered > patience) fail(SessionLost('no answer for ${patience.inSeconds} s'));
    });
    try {
      await over.future;
    } finally {
      watch.cancel();
      _pump = () {};
      socket.close().ignore(); // it waits for the server, for 5 s at most
    }
  }
}

Future<void> main(List<String> arguments) async {
  if (arguments.isEmpty) {
    stderr.writeln('usage: dart client.dart talk.wav [ws://HOST:8000/v1/realtime]');
    exit(2);
  }
  stdout.done.catchError((_) => exit(1)).ignore(); // as in: ... | head
  try {
    final file = await File(arguments[0]).readAsBytes(), head = ByteData.sublistView(file);
    int field(int at) => head.getUint16(at, Endian.little);
    final known = file.length >= 44 && latin1.decode(file.sublist(36, 40)) == 'data';
    if (!known || field(22) != 1 || field(24) != rate || field(34) != 16) {
      throw Refused('the WAV must be 16 kHz, mono, 16 bit, header 44 bytes: sox FILE -r 16000 -c 1 -b 16 talk.wav');
    }
    final samples = Int16List.sublistView(file.sublist(44, file.length - file.length % 2));
    final transcription = Transcription(Uri.parse(arguments.elementAtOrNull(1) ?? 'ws://localhost:8000/v1/realtime'),
        key: Platform.environment['VLLM_API_KEY'],
        onWord: (word) => stdout.writeln('${word.end.toStringAsFixed(2).padLeft(8)} ${word.text}'),
        onState: (_, message) => message.isEmpty ? null : stderr.writeln(message));
    for (var from = 0; from < samples.length; from += rate ~/ 10) {
      await transcription.room();
      transcription.add(samples.sublist(from, min(from + rate ~/ 10, samples.length)));
    }
    transcription.end();
    await transcription.finished;
  } on Exception catch (error) {
    stderr.writeln('error: ${'$error'.split('\n').first}');
    exitCode = 1;
  }
  exit(exitCode);
}
